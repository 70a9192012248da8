//! `wilco queues` and `wilco dead`: what is on the broker, and what nobody could take.

use std::{num::NonZeroU32, process::ExitCode};

use serde::Serialize;
use serde_json::{Value, json};
use wilco::{
    Broker, Incarnation, QueueName,
    broker::{DeadLetter, DeadLetterKey},
};

use super::{
    args::{DeadAction, DeadLetterArgs, Global},
    output::{self, Output},
    place::patience,
    problem::{Exit, Outcome, Problem},
};

/// How many dead letters are read at once, and shown at most unless `--json` asks for all.
const PAGE: NonZeroU32 = NonZeroU32::new(500).expect("not zero");

pub(super) async fn list(global: &Global, output: Output) -> Outcome {
    let broker = global.connect_shared().await?;
    let queues = broker.list(patience()).await?;
    let columns = [
        "queue",
        "guest",
        "ready",
        "delayed",
        "in flight",
        "dead",
        "attached",
    ];
    let mut table = output::table(&columns);
    for queue in &queues {
        output.json(queue);
        table.add_row(vec![
            queue.name.to_string(),
            owner(&queue.name),
            queue.ready.to_string(),
            queue.delayed.to_string(),
            queue.in_flight.to_string(),
            queue.dead.to_string(),
            queue.consumers.to_string(),
        ]);
    }
    if queues.is_empty() {
        output.say("no queues");
    } else {
        output.say(table);
    }
    Ok(ExitCode::SUCCESS)
}

fn owner(queue: &QueueName) -> String {
    match queue.address() {
        Some(address) => address.to_string(),
        None if queue.is_commands() => "(a long id)".into(),
        None => "(reports)".into(),
    }
}

pub(super) async fn dead(global: &Global, action: DeadAction, output: Output) -> Outcome {
    let broker = global.connect_shared().await?;
    match action {
        DeadAction::List { queue, incarnation } => {
            let queues = match queue {
                Some(queue) => vec![global.queue(&queue, incarnation).await?],
                None => {
                    let queues = broker.list(patience()).await?;
                    queues
                        .into_iter()
                        .filter(|q| q.dead > 0)
                        .map(|q| q.name)
                        .collect()
                }
            };
            list_dead(&*broker, &queues, output).await
        }
        DeadAction::Show(args) => show_dead(global, &*broker, args, output).await,
        DeadAction::Redrive {
            queue,
            keys,
            all,
            incarnation,
        } => {
            let queue = global.queue(&queue, incarnation).await?;
            let keys = if all {
                let letters = all_dead(&*broker, &queue).await?;
                letters.into_iter().map(|letter| letter.key).collect()
            } else {
                keys.into_iter().map(DeadLetterKey).collect()
            };
            redrive(&*broker, &queue, keys, output).await
        }
    }
}

async fn list_dead(broker: &dyn Broker, queues: &[QueueName], output: Output) -> Outcome {
    let columns = ["queue", "key", "command", "kind", "deliveries", "reason"];
    let mut table = output::table(&columns);
    for queue in queues {
        for letter in all_dead(broker, queue).await? {
            output.json(&LetterLine::new(queue, &letter));
            table.add_row(vec![
                queue.to_string(),
                letter.key.0,
                letter.message.id.to_string(),
                letter.message.kind.to_string(),
                letter.attempts.to_string(),
                letter.reason,
            ]);
        }
    }
    if table.is_empty() {
        output.say("no dead letters");
    } else {
        output.say(table);
    }
    Ok(ExitCode::SUCCESS)
}

/// A dead letter as `--json` shows it.
#[derive(Serialize)]
struct LetterLine<'a> {
    queue: &'a QueueName,
    key: &'a DeadLetterKey,
    command: &'a str,
    kind: &'a str,
    content_type: &'a str,
    headers: &'a wilco::Headers,
    body: Value,
    deliveries: u32,
    reason: &'a str,
}

impl<'a> LetterLine<'a> {
    fn new(queue: &'a QueueName, letter: &'a DeadLetter) -> Self {
        Self {
            queue,
            key: &letter.key,
            command: letter.message.id.as_str(),
            kind: letter.message.kind.as_str(),
            content_type: letter.message.content_type.as_str(),
            headers: &letter.message.headers,
            body: body(letter),
            deliveries: letter.attempts,
            reason: &letter.reason,
        }
    }
}

/// JSON as it is, text as a string, other bytes as an array of them.
fn body(letter: &DeadLetter) -> Value {
    let bytes = &letter.message.body;
    serde_json::from_slice(bytes).unwrap_or_else(|_| match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes.to_vec().into(),
    })
}

async fn show_dead(
    global: &Global,
    broker: &dyn Broker,
    args: DeadLetterArgs,
    output: Output,
) -> Outcome {
    let queue = global.queue(&args.queue, args.incarnation).await?;
    let letters = all_dead(broker, &queue).await?;
    let letter = letters
        .iter()
        .find(|letter| letter.key.0 == args.key)
        .ok_or_else(|| missing(&queue, &args.key))?;
    output.json(&LetterLine::new(&queue, letter));
    let DeadLetter {
        key,
        message,
        reason,
        attempts,
        ..
    } = letter;
    output.say(format_args!(
        "queue:       {queue}\nkey:         {}\ncommand:     {}\nkind:        {}\ntype:        {}\n\
         deliveries:  {attempts}\nreason:      {reason}",
        key.0, message.id, message.kind, message.content_type
    ));
    for (name, value) in message.headers.iter() {
        output.say(format_args!("header:      {name} = {value}"));
    }
    let shown = body(letter);
    let pretty = match &shown {
        Value::String(text) => text.clone(),
        value => serde_json::to_string_pretty(value).unwrap_or_default(),
    };
    output.say(format_args!(
        "body:        {} bytes\n{pretty}",
        message.body.len()
    ));
    Ok(ExitCode::SUCCESS)
}

async fn redrive(
    broker: &dyn Broker,
    queue: &QueueName,
    keys: Vec<DeadLetterKey>,
    output: Output,
) -> Outcome {
    let mut first_missing = None;
    for key in keys {
        let moved = broker.redrive(queue, &key, patience()).await?;
        output.json(&json!({ "queue": queue, "key": key, "redriven": moved }));
        if moved {
            output.say(format_args!("{} is back at the end of {queue}", key.0));
        } else {
            first_missing.get_or_insert(key);
        }
    }
    match first_missing {
        None => Ok(ExitCode::SUCCESS),
        Some(key) => Err(missing(queue, &key.0)),
    }
}

fn missing(queue: &QueueName, key: &str) -> Problem {
    Problem::new(
        Exit::Missing,
        format!(
            "{queue} has no dead letter {key:?} (any more); wilco dead list shows those it has"
        ),
    )
}

async fn all_dead(broker: &dyn Broker, queue: &QueueName) -> wilco::Result<Vec<DeadLetter>> {
    let mut letters: Vec<DeadLetter> = Vec::new();
    loop {
        let after = letters.last().map(|letter| letter.key.clone());
        let page = broker
            .dead_letters(queue, after.as_ref(), PAGE, patience())
            .await?;
        let last = page.len() < PAGE.get() as usize;
        letters.extend(page);
        if last {
            return Ok(letters);
        }
    }
}

impl Global {
    /// The queue that is meant by a guest's id or by a queue's own name.
    async fn queue(&self, text: &str, incarnation: Option<Incarnation>) -> Outcome<QueueName> {
        if let (Ok(queue), None) = (text.parse(), incarnation) {
            return Ok(queue);
        }
        let id = wilco::GuestId::new(text)?;
        Ok(self.address(&id, incarnation).await?.queue())
    }
}
