//! What one who stole a guest's credential would try on RabbitMQ, by the plain client.

use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind,
    ExchangeKind,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
        ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
        QueuePurgeOptions,
    },
    types::{AMQPValue, FieldTable, LongString},
};
use url::Url;

use super::administration::ask_as;
use crate::harness::{Answer, Attempt, On, Theft};

/// Every attempt, each on a channel of its own: a refusal ends the channel.
pub(super) async fn attempts(
    admin: &str,
    management: u16,
    theft: &Theft<'_>,
) -> Result<Vec<Attempt>, String> {
    let mut url = Url::parse(theft.url).map_err(|error| error.to_string())?;
    url.set_query(None);
    let mut admin = Url::parse(admin).map_err(|error| error.to_string())?;
    admin.set_query(None);
    let mut thief = Thief {
        connection: connect(url.as_str()).await?,
        owner: connect(admin.as_str()).await?,
        tried: Vec::new(),
    };
    let user = format!(
        "{}:{}",
        unescaped(url.username()),
        url.password().unwrap_or_default()
    );
    let vhost = url.path().trim_start_matches('/').to_owned();
    let tried = thief.try_all(theft, management, &user, &vhost).await;
    let is_allowed = |attempt: &Attempt| matches!(attempt.answer, Answer::Allowed(_));
    match tried {
        // What was allowed broke what comes after it: the deleted queue is not there to be purged.
        Err(error) if !thief.tried.iter().any(is_allowed) => Err(error),
        _ => Ok(thief.tried),
    }
}

/// The guest's user and password.
pub(super) fn login(theft: &Theft<'_>) -> Result<(String, String), String> {
    let url = Url::parse(theft.url).map_err(|error| error.to_string())?;
    let password = url.password().unwrap_or_default();
    Ok((unescaped(url.username()), unescaped(password)))
}

async fn connect(url: &str) -> Result<Connection, String> {
    let connected = Connection::connect(url, ConnectionProperties::default()).await;
    connected.map_err(|error| error.to_string())
}

/// The names of users are escaped where they stand in a URL.
fn unescaped(text: &str) -> String {
    url::form_urlencoded::parse(format!("x={text}").as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

struct Thief {
    connection: Connection,
    owner: Connection,
    tried: Vec<Attempt>,
}

/// What is tried on a queue by its name.
#[derive(Clone, Copy)]
enum Verb {
    Get,
    Consume,
    Declare,
    Delete,
    Purge,
}

impl Thief {
    async fn try_all(
        &mut self,
        theft: &Theft<'_>,
        management: u16,
        user: &str,
        vhost: &str,
    ) -> Result<(), String> {
        let (own, other) = (
            theft.own.queue().to_string(),
            theft.other.queue().to_string(),
        );
        let reports = theft.reports.to_string();
        let (dead, lane) = (format!("{other}.dead"), format!("{other}.lane"));
        let queues = [
            (On::OtherQueue, &other),
            (On::OtherDeadLetters, &dead),
            (On::OtherLane, &lane),
            (On::Reports, &reports),
        ];
        for (on, queue) in queues {
            for verb in [
                Verb::Get,
                Verb::Consume,
                Verb::Declare,
                Verb::Delete,
                Verb::Purge,
            ] {
                self.on_queue(verb, on, queue).await?;
            }
        }
        for queue in [
            format!("{other}.notes"),
            format!("{own}.dead"),
            "wilco.index".into(),
        ] {
            self.on_queue(Verb::Get, On::Broker, &queue).await?;
        }
        self.on_queue(Verb::Declare, On::OwnQueue, &own).await?;
        self.on_queue(Verb::Delete, On::OwnQueue, &own).await?;
        self.on_queue(Verb::Declare, On::Broker, "wilco.q.conformance-new.1")
            .await?;

        // By every exchange that it knows of.
        let out = |queue: &str| format!("{queue}.out");
        for exchange in ["", "wilco", &out(&other), "amq.topic"] {
            self.publish("write", On::OtherQueue, exchange, &other)
                .await?;
            self.publish("write", On::OtherDeadLetters, exchange, &dead)
                .await?;
            self.publish("write", On::OtherLane, exchange, &lane)
                .await?;
            self.publish("write", On::OwnQueue, exchange, &own).await?;
            self.publish("write", On::Reports, exchange, &reports)
                .await?;
        }
        self.publish(
            "answer",
            On::OtherLane,
            "wilco.reply",
            &format!("{lane}.somebody"),
        )
        .await?;
        self.astray(On::OtherQueue, &own, &other, &[&other, &dead])
            .await?;
        self.astray(On::OwnQueue, &own, &own, &[&own]).await?;

        self.bind("bind", On::OtherQueue, &other, &out(&own), &other)
            .await?;
        self.bind("bind", On::OtherDeadLetters, &dead, &out(&own), &dead)
            .await?;
        self.bind("bind", On::OwnQueue, &own, &out(&own), &own)
            .await?;
        self.bind("bind", On::OwnQueue, &own, "wilco", &other)
            .await?;
        self.eavesdrop(&own).await?;
        self.exchange("conformance-exchange").await?;
        self.dead_letter_elsewhere(&own, &other).await?;
        self.administration(management, user, vhost, &other).await;
        Ok(())
    }

    async fn channel(&self) -> Result<Channel, String> {
        let channel = self.connection.create_channel().await;
        channel.map_err(|error| error.to_string())
    }

    fn tried(&mut self, what: &'static str, on: On, how: String, answer: Answer) {
        self.tried.push(Attempt::new(what, on, how, answer));
    }

    async fn on_queue(&mut self, verb: Verb, on: On, queue: &str) -> Result<(), String> {
        let channel = self.channel().await?;
        let name = || queue.into();
        let (what, how, result) = match verb {
            Verb::Get => {
                let got = channel.basic_get(name(), BasicGetOptions::default()).await;
                ("read", "basic.get", got.map(drop))
            }
            Verb::Consume => {
                let options = BasicConsumeOptions::default();
                let consumed = channel
                    .basic_consume(name(), "thief".into(), options, FieldTable::default())
                    .await;
                ("read", "basic.consume", consumed.map(drop))
            }
            Verb::Declare => {
                let options = QueueDeclareOptions {
                    durable: true,
                    ..QueueDeclareOptions::default()
                };
                let made = channel
                    .queue_declare(name(), options, FieldTable::default())
                    .await;
                ("declare", "queue.declare", made.map(drop))
            }
            Verb::Delete => {
                let deleted = channel
                    .queue_delete(name(), QueueDeleteOptions::default())
                    .await;
                ("delete", "queue.delete", deleted.map(drop))
            }
            Verb::Purge => {
                let purged = channel
                    .queue_purge(name(), QueuePurgeOptions::default())
                    .await;
                ("purge", "queue.purge", purged.map(drop))
            }
        };
        self.tried(what, on, format!("{how} {queue}"), answer(result));
        if queue == "wilco.index" {
            let last = self.tried.last().cloned();
            self.tried.extend(last.map(|last| Attempt {
                what: "list",
                ..last
            }));
        }
        Ok(())
    }

    async fn publish(
        &mut self,
        what: &'static str,
        on: On,
        exchange: &str,
        key: &str,
    ) -> Result<(), String> {
        let sent = self.send(exchange, key, BasicProperties::default()).await?;
        let how = format!("basic.publish to exchange {exchange:?} with key {key}");
        self.tried(what, on, how, answer(sent.map(drop)));
        Ok(())
    }

    async fn send(
        &self,
        exchange: &str,
        key: &str,
        properties: BasicProperties,
    ) -> Result<lapin::Result<Confirmation>, String> {
        let channel = self.channel().await?;
        let confirming = channel
            .confirm_select(ConfirmSelectOptions::default())
            .await;
        confirming.map_err(|error| error.to_string())?;
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let published = channel
            .basic_publish(exchange.into(), key.into(), options, b"stolen", properties)
            .await;
        Ok(match published {
            Ok(confirm) => confirm.await,
            Err(error) => Err(error),
        })
    }

    /// By its own exchange, which takes it: with the other's name as its key, and in CC and BCC, which
    /// old versions do not hold to topic permissions.
    async fn astray(
        &mut self,
        on: On,
        own: &str,
        key: &str,
        targets: &[&String],
    ) -> Result<(), String> {
        let before = self.counts(targets).await?;
        let mut headers = FieldTable::default();
        let names: Vec<AMQPValue> = targets
            .iter()
            .map(|name| AMQPValue::LongString(LongString::from(name.as_str())))
            .collect();
        for header in ["CC", "BCC"] {
            headers.insert(header.into(), AMQPValue::FieldArray(names.clone().into()));
        }
        let properties = BasicProperties::default().with_headers(headers);
        let exchange = format!("{own}.out");
        let sent = self.send(&exchange, key, properties).await?;
        let how = format!("basic.publish to exchange {exchange} with key, CC and BCC {targets:?}");
        let after = self.counts(targets).await?;
        let answer = match sent {
            Ok(Confirmation::Ack(Some(_))) if before == after => {
                Answer::Refused("returned, it leads nowhere".into())
            }
            Ok(confirmation) => Answer::Allowed(format!("{confirmation:?}: {before:?}, {after:?}")),
            Err(error) => answer(Err(error)),
        };
        self.tried("write", on, how, answer);
        Ok(())
    }

    /// How much is in these, as their owner sees it.
    async fn counts(&self, queues: &[&String]) -> Result<Vec<u32>, String> {
        let channel = self.owner.create_channel().await;
        let channel = channel.map_err(|error| error.to_string())?;
        let mut counts = Vec::new();
        for queue in queues {
            let options = QueueDeclareOptions {
                passive: true,
                ..QueueDeclareOptions::default()
            };
            let looked = channel
                .queue_declare(queue.as_str().into(), options, FieldTable::default())
                .await;
            counts.push(looked.map_err(|error| error.to_string())?.message_count());
        }
        Ok(counts)
    }

    async fn bind(
        &mut self,
        what: &'static str,
        on: On,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<(), String> {
        let channel = self.channel().await?;
        let options = QueueBindOptions::default();
        let bound = channel
            .queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                options,
                FieldTable::default(),
            )
            .await;
        let how = format!("queue.bind of {queue} to {exchange} with key {key}");
        self.tried(what, on, how, answer(bound));
        Ok(())
    }

    /// With a queue that it may have, for what others answer and are told.
    async fn eavesdrop(&mut self, own: &str) -> Result<(), String> {
        let queue = format!("{own}.ask.thief");
        let channel = self.channel().await?;
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let made = channel
            .queue_declare(queue.as_str().into(), options, FieldTable::default())
            .await;
        made.map_err(|error| format!("a guest's own lane: {error}"))?;
        for (exchange, key) in [
            ("wilco.reply", "#"),
            ("wilco.reply", "*.*.#"),
            ("wilco", own),
            ("amq.topic", "#"),
            ("amq.rabbitmq.trace", "#"),
        ] {
            self.bind("read", On::OtherLane, &queue, exchange, key)
                .await?;
        }
        Ok(())
    }

    async fn exchange(&mut self, name: &str) -> Result<(), String> {
        let channel = self.channel().await?;
        let options = ExchangeDeclareOptions::default();
        let made = channel
            .exchange_declare(
                name.into(),
                ExchangeKind::Fanout,
                options,
                FieldTable::default(),
            )
            .await;
        self.tried(
            "declare",
            On::Broker,
            format!("exchange.declare {name}"),
            answer(made),
        );
        Ok(())
    }

    /// A queue under a name that it may have, whose dead letters go where it may not write.
    async fn dead_letter_elsewhere(&mut self, own: &str, other: &str) -> Result<(), String> {
        let channel = self.channel().await?;
        let text = |text: &str| AMQPValue::LongString(LongString::from(text));
        let mut arguments = FieldTable::default();
        arguments.insert("x-dead-letter-exchange".into(), text(""));
        arguments.insert("x-dead-letter-routing-key".into(), text(other));
        let made = channel
            .queue_declare(
                format!("{own}.lock.thief").into(),
                QueueDeclareOptions::default(),
                arguments,
            )
            .await;
        let how = format!("queue.declare {own}.lock.thief, its dead letters to {other}");
        self.tried("write", On::OtherQueue, how, answer(made.map(drop)));
        Ok(())
    }

    async fn administration(&mut self, port: u16, user: &str, vhost: &str, other: &str) {
        for (what, method, path) in [
            ("list", "GET", "/api/queues".to_owned()),
            ("list", "GET", format!("/api/queues/{vhost}/{other}")),
            ("list", "GET", "/api/users".to_owned()),
            ("administer", "DELETE", format!("/api/vhosts/{vhost}")),
            ("administer", "DELETE", "/api/users/guest".to_owned()),
        ] {
            let (user, how) = (user.to_owned(), format!("{method} {path}"));
            let asked =
                tokio::task::spawn_blocking(move || ask_as(port, &user, method, &path)).await;
            let answer = match asked {
                Ok(Err(said)) if said.contains("status 401") || said.contains("status 403") => {
                    Answer::Refused(said)
                }
                said => Answer::Allowed(format!("{said:?}")),
            };
            self.tried(what, On::Broker, how, answer);
        }
    }
}

/// A refusal is the server's own word: access refused, and nothing else.
fn answer(result: lapin::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::Allowed("done".into()),
        Err(error) => match error.kind() {
            ErrorKind::ProtocolError(said) if said.get_id() == 403 => {
                Answer::Refused(said.get_message().to_string())
            }
            _ => Answer::Allowed(format!("no refusal: {error}")),
        },
    }
}
