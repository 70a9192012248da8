//! Asking a guest something on its lane.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;

use crate::{
    broker::Broker,
    deadline::Deadline,
    error::{Error, ErrorKind, Result},
    message::CommandId,
    names::GuestAddress,
    sign::{REFUSALS, Signer},
    wire::{Answer, Ask, CommandState, Pong},
    workflow::record::now_ms,
};

/// How much longer than its asker waits a question may be answered.
const ON_THE_WAY: Duration = Duration::from_secs(30);

/// The control plane's end of one guest's lane.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) broker: Arc<dyn Broker>,
    pub(crate) address: GuestAddress,
    pub(crate) signer: Option<Arc<Signer>>,
}

impl Asker {
    pub(crate) async fn ping(&self, within: Duration) -> Result<Pong> {
        let nonce = Uuid::new_v4().simple().to_string();
        let ask = Ask::Ping {
            nonce: nonce.clone(),
        };
        match self.ask(ask, within).await? {
            Answer::Pong(pong) if pong.nonce != nonce => Err(Error::new(
                ErrorKind::Undecodable,
                "the pong answers another ping",
            )),
            Answer::Pong(pong)
                if (&pong.guest, pong.incarnation)
                    == (&self.address.guest, self.address.incarnation) =>
            {
                Ok(pong)
            }
            Answer::Pong(pong) => Err(Error::new(
                ErrorKind::WrongIncarnation,
                format!(
                    "{} incarnation {} answered for {}",
                    pong.guest, pong.incarnation, self.address
                ),
            )),
            other => Err(unexpected(other)),
        }
    }

    /// How a command stands; answered once it has ended, or after `wait`.
    pub(crate) async fn status(
        &self,
        command: &CommandId,
        wait: Duration,
        within: Duration,
    ) -> Result<CommandState> {
        let ask = Ask::Status {
            command: command.clone(),
            wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        };
        self.command(ask, within + wait).await
    }

    /// Tells the guest never to start a command; its answer says whether that was in time.
    pub(crate) async fn withdraw(
        &self,
        command: &CommandId,
        within: Duration,
    ) -> Result<CommandState> {
        let ask = Ask::Withdraw {
            command: command.clone(),
        };
        self.command(ask, within).await
    }

    /// Tells the machine that it was given up.
    pub(crate) async fn dismiss(&self, within: Duration) -> Result<()> {
        match self.ask(Ask::Dismiss, within).await? {
            Answer::Dismissed => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    async fn command(&self, ask: Ask, within: Duration) -> Result<CommandState> {
        match self.ask(ask, within).await? {
            Answer::Command(state) => Ok(state),
            other => Err(unexpected(other)),
        }
    }

    async fn ask(&self, ask: Ask, within: Duration) -> Result<Answer> {
        let now_ms = now_ms();
        let valid = within.saturating_add(ON_THE_WAY);
        let expires_ms =
            now_ms.saturating_add(u64::try_from(valid.as_millis()).unwrap_or(u64::MAX));
        let signer = self.signer.as_deref();
        let body = ask.encode(&self.address, signer, (now_ms, expires_ms))?;
        let deadline = Deadline::after(within);
        let reply = self.broker.request(&self.address, body, deadline).await?;
        match Answer::decode(&reply)? {
            Answer::Error(error) if error.kind == "wrong_incarnation" => {
                Err(Error::new(ErrorKind::WrongIncarnation, error.message))
            }
            Answer::Error(error) if REFUSALS.contains(&error.kind.as_str()) => Err(Error::new(
                ErrorKind::NotTrusted,
                format!("the guest refuses what it is asked: {}", error.message),
            )),
            Answer::Error(error) => Err(Error::new(
                ErrorKind::Remote {
                    kind: error.kind.clone(),
                },
                error.message,
            )),
            answer => Ok(answer),
        }
    }
}

fn unexpected(answer: Answer) -> Error {
    Error::new(
        ErrorKind::Undecodable,
        format!("an answer to another question: {answer:?}"),
    )
}
