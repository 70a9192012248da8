//! RabbitMQ as a private process: one that the checks of a program share, each in a virtual host of its
//! own, and one for each check that breaks it.

mod administration;
mod litter;
mod node;
mod theft;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::OnceCell;
use wilco::{Broker, QueueName, durability::Level};

pub use self::node::command;
use self::{
    administration::{ask, indexed, names},
    node::Node,
};
use crate::harness::{Attempt, Facts, Faults, Harness, Litter, Server, Theft, Unavailable, Use};

/// Three heartbeats of the default of two seconds, and what a loaded machine takes.
const TAKEOVER: Duration = Duration::from_secs(7);

/// RabbitMQ, as Debian's package `rabbitmq-server` has it.
#[derive(Debug)]
pub struct RabbitMq;

#[async_trait]
impl Harness for RabbitMq {
    fn name(&self) -> &'static str {
        "rabbitmq"
    }

    async fn start(&self, usage: Use) -> Result<Box<dyn Server>, String> {
        static SHARED: OnceCell<Arc<Node>> = OnceCell::const_new();
        let node = match usage {
            Use::Shared | Use::Credentials => {
                Arc::clone(SHARED.get_or_try_init(Node::start).await?)
            }
            Use::Alone | Use::Cluster => match at_rest() {
                Some(node) => node,
                None => Node::start().await?,
            },
        };
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let vhost = format!("check-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        node.ask("PUT", &format!("/api/vhosts/{vhost}")).await?;
        // Who kills the server has waited for a queue to be on its disk, as the default has it. Elsewhere
        // new queues are not waited for: nothing breaks there.
        let options = match usage {
            Use::Shared | Use::Credentials => "?fresh=0s",
            Use::Alone | Use::Cluster => "",
        };
        Ok(Box::new(Vhost {
            node,
            vhost,
            options,
            usage,
        }))
    }
}

/// Servers that checks had for themselves and left in order. A start takes most of what a check of
/// section F does, so the next one gets one of these, with a virtual host of its own as everywhere.
static AT_REST: Mutex<Vec<Arc<Node>>> = Mutex::new(Vec::new());

fn at_rest() -> Option<Arc<Node>> {
    AT_REST.lock().unwrap_or_else(PoisonError::into_inner).pop()
}

/// A server's part that belongs to one check.
#[derive(Debug)]
struct Vhost {
    node: Arc<Node>,
    vhost: String,
    options: &'static str,
    usage: Use,
}

impl Drop for Vhost {
    fn drop(&mut self) {
        // A server that was broken takes its virtual hosts with it.
        let path = format!("/api/vhosts/{}", self.vhost);
        let in_order = ask(self.node.management, "DELETE", &path).is_ok();
        if in_order && self.usage == Use::Alone {
            AT_REST
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(Arc::clone(&self.node));
        }
    }
}

impl Vhost {
    fn url_at(&self, address: SocketAddr) -> String {
        let management = match self.usage {
            Use::Credentials => format!("&management=http://127.0.0.1:{}", self.node.management),
            _ => String::new(),
        };
        format!(
            "amqp://guest:guest@{address}/{}{}{management}",
            self.vhost, self.options
        )
    }

    /// Everything of this sort that names the queue.
    async fn named(&self, sort: &str, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let path = format!("/api/{sort}/{}", self.vhost);
        let listed = self.node.ask("GET", &path).await;
        let listed = listed.map_err(Unavailable::because)?;
        let entries = listed.as_array().cloned().unwrap_or_default();
        let ours = entries
            .iter()
            .filter(|entry| names(entry, queue.as_str()))
            .map(|entry| {
                let name = |member: &str| entry[member].as_str().unwrap_or_default().to_owned();
                format!(
                    "{sort}: {}{} {}",
                    name("name"),
                    name("destination"),
                    name("routing_key")
                )
            });
        Ok(ours.collect())
    }

    /// The messages of the index that name the queue, as the server's administration reads them.
    async fn indexed(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let (port, vhost, queue) = (self.node.management, self.vhost.clone(), queue.to_string());
        let found = tokio::task::spawn_blocking(move || indexed(port, &vhost, &queue)).await;
        found
            .map_err(|error| Unavailable::because(error.to_string()))?
            .map_err(Unavailable::because)
    }
}

#[async_trait]
impl Server for Vhost {
    fn facts(&self) -> Facts {
        Facts::shared(
            self.node.version.clone(),
            self.url_at(self.node.process.address()),
            TAKEOVER,
            Level::Power,
        )
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        wilco::connect(&self.url_at(self.node.process.address())).await
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        let mut found = Vec::new();
        for sort in ["queues", "exchanges", "bindings"] {
            found.extend(self.named(sort, queue).await?);
        }
        found.extend(self.indexed(queue).await?);
        Ok(found)
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.node.process.stop().await?;
        self.node.up().await.map_err(Unavailable::because)
    }

    fn refused_url(&self) -> Result<String, Unavailable> {
        let url = self.url_at(self.node.process.address());
        Ok(url.replacen("guest:guest", "guest:wrong", 1))
    }

    fn admin_url(&self) -> Result<String, Unavailable> {
        Ok(self.url_at(self.node.process.address()))
    }

    async fn forbidden(&self, theft: &Theft<'_>) -> Result<Vec<Attempt>, Unavailable> {
        theft::attempts(&self.admin_url()?, self.node.management, theft)
            .await
            .map_err(Unavailable::because)
    }

    async fn litter(&self, place: Litter<'_>) -> Result<usize, Unavailable> {
        let address = self.node.process.address();
        let published = match place {
            Litter::Queue(queue) => {
                let by = litter::Publisher {
                    user: "guest",
                    password: "guest",
                    vhost: &self.vhost,
                    exchange: "",
                    key: queue.as_str(),
                };
                litter::publish(address, &by).await
            }
            Litter::Reports(theft) => {
                let (user, password) = theft::login(theft).map_err(Unavailable::because)?;
                let by = litter::Publisher {
                    user: &user,
                    password: &password,
                    vhost: &self.vhost,
                    exchange: &format!("{}.out", theft.own.queue()),
                    key: theft.reports.as_str(),
                };
                litter::publish(address, &by).await
            }
        };
        published.map_err(Unavailable::because)
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Ok(self)
    }
}

#[async_trait]
impl Faults for Vhost {
    async fn kill(&self) -> Result<(), Unavailable> {
        self.node.process.kill().await
    }

    async fn start(&self) -> Result<(), Unavailable> {
        self.node.up().await.map_err(Unavailable::because)
    }

    fn pause(&self) -> Result<(), Unavailable> {
        self.node.process.pause()
    }

    fn resume(&self) -> Result<(), Unavailable> {
        self.node.process.resume()
    }

    fn address(&self) -> SocketAddr {
        self.node.process.address()
    }

    fn url_via(&self, proxy: SocketAddr) -> String {
        self.url_at(proxy)
    }

    async fn alarm(&self, on: bool) -> Result<(), Unavailable> {
        self.node.alarm(on).await.map_err(Unavailable::because)
    }
}
