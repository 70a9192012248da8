//! How a guest answers on its lane: pings at once, whatever else it is busy with (law R4).

use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::{
    broker::{Request, Responder},
    deadline::Deadline,
    error::{Error, Result},
    message::CommandId,
    names::GuestAddress,
    sign::Guard,
    wire::{Answer, Ask, AskForm, BootId, CommandState, Pong, RemoteError},
    workflow::guest::book::Book,
};

/// How many questions wait for a command's end at once.
const WAITING_QUESTIONS: usize = 256;

/// The longest that one question waits: a broker's idle timers must not bite.
const LONGEST_WAIT: Duration = Duration::from_secs(20);

const REPLY_WITHIN: Duration = Duration::from_secs(5);

/// A guest's end of its lane.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) address: GuestAddress,
    pub(super) boot: BootId,
    pub(super) book: Book,
    pub(super) guard: Option<Arc<Guard>>,
}

impl Lane {
    /// Answers until the lane is gone for good.
    pub(super) async fn serve(self, mut responder: Box<dyn Responder>) -> Error {
        let lane = Arc::new(self);
        let waiting = Arc::new(Semaphore::new(WAITING_QUESTIONS));
        loop {
            let request = match responder.next().await {
                Ok(request) => request,
                Err(error) => return error,
            };
            let ask = match lane.read(&request) {
                Ok(Ask::Ping { nonce }) => {
                    // Whoever pings has made the queue first, as a rule.
                    lane.book.nudge();
                    lane.reply(request, Answer::Pong(lane.pong(nonce))).await;
                    continue;
                }
                Ok(ask) => ask,
                Err(error) => {
                    // Not reported: who can ask for nothing must not fill the queue of reports either.
                    tracing::warn!(guest = %lane.address, %error, "a question was refused");
                    lane.book.count_refused();
                    lane.reply(request, Answer::Error(error)).await;
                    continue;
                }
            };
            let Ok(permit) = waiting.clone().try_acquire_owned() else {
                let busy = RemoteError::new("busy", "too many questions wait here already");
                lane.reply(request, Answer::Error(busy)).await;
                continue;
            };
            let lane = lane.clone();
            tokio::spawn(async move {
                let answer = lane.answer(ask).await.unwrap_or_else(|error| {
                    Answer::Error(RemoteError::new("failed", error.to_string()))
                });
                lane.reply(request, answer).await;
                drop(permit);
            });
        }
    }

    fn read(&self, request: &Request) -> std::result::Result<Ask, RemoteError> {
        let undecodable = |error: Error| RemoteError::new("undecodable", error.to_string());
        let form = AskForm::decode(&request.body).map_err(undecodable)?;
        if let Some(guard) = &self.guard {
            form.check(guard)?;
        }
        if form.address() == self.address {
            form.ask().map_err(undecodable)
        } else {
            Err(RemoteError::new(
                "wrong_incarnation",
                format!("this is {}", self.address),
            ))
        }
    }

    fn pong(&self, nonce: String) -> Pong {
        let snapshot = self.book.snapshot();
        let mut pong = Pong::new(
            &self.address,
            self.boot.clone(),
            snapshot.phase,
            snapshot.last_command,
            nonce,
        );
        (pong.refused, pong.repeated) = (snapshot.refused, snapshot.repeated);
        pong
    }

    async fn answer(&self, ask: Ask) -> Result<Answer> {
        Ok(match ask {
            Ask::Ping { nonce } => Answer::Pong(self.pong(nonce)),
            Ask::Status { command, wait_ms } => {
                let wait = Duration::from_millis(wait_ms).min(LONGEST_WAIT);
                Answer::Command(self.ended(&command, wait).await?)
            }
            Ask::Withdraw { command } => Answer::Command(self.book.withdraw(command).await?),
            Ask::Dismiss => {
                self.book.dismiss().await?;
                Answer::Dismissed
            }
        })
    }

    /// The command's state: when it has ended, or as it is after this time.
    async fn ended(&self, command: &CommandId, wait: Duration) -> Result<CommandState> {
        let mut changes = self.book.changes();
        let until_end = async {
            loop {
                changes.mark_unchanged();
                let state = self.book.status(command.clone()).await?;
                if matches!(state, CommandState::Done(_) | CommandState::Withdrawn) {
                    return Ok(state);
                }
                if changes.changed().await.is_err() {
                    return Ok(state);
                }
            }
        };
        match timeout(wait, until_end).await {
            Ok(state) => state,
            Err(_) => self.book.status(command.clone()).await,
        }
    }

    async fn reply(&self, request: Request, answer: Answer) {
        let sent = match answer.encode() {
            Ok(body) => request.reply(body, Deadline::after(REPLY_WITHIN)).await,
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            // Law R6: an asker that is gone is no trouble of ours.
            tracing::debug!(guest = %self.address, %error, "an answer was not sent");
        }
    }
}
