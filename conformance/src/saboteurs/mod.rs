//! stub
use crate::harness::*;
use async_trait::async_trait;
#[derive(Clone, Copy, Debug)]
pub struct Saboteur {
    pub name: &'static str,
    pub caught_by: &'static str,
}
pub fn all() -> Vec<Saboteur> {
    vec![]
}
#[derive(Debug)]
pub struct Sabotaged;
impl Sabotaged {
    pub fn new(_: Box<dyn Harness>, _: Saboteur) -> Self {
        Self
    }
}
#[async_trait]
impl Harness for Sabotaged {
    fn name(&self) -> &'static str {
        "x"
    }
    async fn start(&self) -> Result<Box<dyn Server>, String> {
        Err("x".into())
    }
}
