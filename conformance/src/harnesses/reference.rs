//! The suite's own broker, by which the suite is measured.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use wilco::{Broker, QueueName, durability::Level};

use crate::{
    harness::{Facts, Faults, Harness, Server, Unavailable, Use},
    reference::ReferenceBroker,
};

/// [`ReferenceBroker`], a new one each time.
#[derive(Debug)]
pub struct Reference;

#[async_trait]
impl Harness for Reference {
    fn name(&self) -> &str {
        "reference"
    }

    async fn start(&self, _usage: Use) -> Result<Box<dyn Server>, String> {
        Ok(Box::new(Started(ReferenceBroker::new())))
    }
}

#[derive(Debug)]
struct Started(ReferenceBroker);

#[async_trait]
impl Server for Started {
    fn facts(&self) -> Facts {
        // It notices at once; the bound is what checks wait for where they have to wait.
        let takeover = Duration::from_millis(500);
        let because = "the reference broker lives inside one process";
        Facts::private(
            env!("CARGO_PKG_VERSION").into(),
            because,
            takeover,
            Level::Process,
        )
    }

    async fn connect(&self) -> wilco::Result<Arc<dyn Broker>> {
        Ok(self.0.connect())
    }

    async fn remains(&self, queue: &QueueName) -> Result<Vec<String>, Unavailable> {
        Ok(self.0.remains(queue))
    }

    async fn restart(&self) -> Result<(), Unavailable> {
        self.0.restart();
        Ok(())
    }

    fn faults(&self) -> Result<&dyn Faults, Unavailable> {
        Err(Unavailable::because(
            "the reference broker lives in this process: nothing to kill or cut",
        ))
    }
}
