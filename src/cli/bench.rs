//! `wilco bench`: what a broker does here, in a minute, through the same trait that everything uses.

use std::{process::ExitCode, sync::Arc, time::Duration, time::Instant};

use bytes::Bytes;
use serde_json::json;
use tokio::task::JoinSet;
use wilco::{
    Broker, Deadline, GuestAddress, GuestId, Message, MessageId, QueueName,
    broker::{ConsumeOptions, DeleteMode, QueueSpec},
};

use super::{
    args::{Bench, Global},
    ask::percentile,
    output::{self, Output},
    problem::{Exit, Outcome, Problem},
};

/// More than any step takes unless something is broken.
fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(120))
}

pub(super) async fn run(global: &Global, args: Bench, output: Output) -> Outcome {
    let broker = global.connect().await?;
    let id = GuestId::new(format!("wilco-bench-{}", MessageId::generate()))?;
    let address = GuestAddress::from(id);
    broker
        .declare(&QueueSpec::new(address.queue()), deadline())
        .await?;
    let measured = measure(&broker, &address, &args, output).await;
    broker
        .delete(&address.queue(), DeleteMode::Discard, deadline())
        .await?;
    broker.close(deadline()).await?;
    measured?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(
    broker: &Arc<dyn Broker>,
    address: &GuestAddress,
    args: &Bench,
    output: Output,
) -> Outcome<()> {
    let queue = address.queue();
    let report = broker.durability(deadline()).await?;
    output.say(format_args!(
        "{} {}, durable to the level {}; bodies of {} bytes",
        report.backend, report.version, report.level, args.bytes
    ));
    let many = args.messages.get() as usize;
    for in_flight in [1, 64, 1_024] {
        let count = if in_flight == 1 {
            many.min(2_000)
        } else {
            many
        };
        let took = publish(broker, &queue, count, in_flight, args.bytes).await?;
        let name = format!("durable publish, {in_flight} in flight");
        rate(output, &name, count, took);
        let took = drain(broker, &queue, count).await?;
        if in_flight > 1 {
            rate(output, "claim and ack", count, took);
        }
    }
    ping(broker, address, output).await
}

fn rate(output: Output, what: &str, count: usize, took: Duration) {
    let per_second = count as f64 / took.as_secs_f64();
    output.json(&json!({ "what": what, "count": count, "per_second": per_second }));
    output.say(format_args!("{what:32} {per_second:>10.0} /s"));
}

async fn publish(
    broker: &Arc<dyn Broker>,
    queue: &QueueName,
    count: usize,
    in_flight: usize,
    bytes: usize,
) -> Outcome<Duration> {
    let body = Bytes::from(vec![b'x'; bytes]);
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..in_flight {
        let (broker, queue, body) = (Arc::clone(broker), queue.clone(), body.clone());
        let share = count / in_flight + usize::from(task < count % in_flight);
        tasks.spawn(async move {
            for _ in 0..share {
                let message = Message::new("bench", body.clone())?;
                broker.publish(&queue, message, deadline()).await?;
            }
            Ok::<_, wilco::Error>(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.map_err(|error| Problem::new(Exit::Defect, error.to_string()))??;
    }
    Ok(start.elapsed())
}

async fn drain(broker: &Arc<dyn Broker>, queue: &QueueName, count: usize) -> Outcome<Duration> {
    let prefetch = const { std::num::NonZeroU32::new(512).expect("not zero") };
    let options = ConsumeOptions::prefetch(prefetch);
    let mut consumer = broker.consume(queue, options, deadline()).await?;
    let start = Instant::now();
    let mut acks = JoinSet::new();
    for _ in 0..count {
        let delivery = deadline().bound(consumer.next()).await??;
        acks.spawn(async move { delivery.ack(deadline()).await });
    }
    while let Some(ack) = acks.join_next().await {
        ack.map_err(|error| Problem::new(Exit::Defect, error.to_string()))??;
    }
    let took = start.elapsed();
    consumer.close(deadline()).await?;
    Ok(took)
}

async fn ping(broker: &Arc<dyn Broker>, address: &GuestAddress, output: Output) -> Outcome<()> {
    let mut responder = broker.respond(address, deadline()).await?;
    let answering = tokio::spawn(async move {
        while let Ok(request) = responder.next().await {
            let body = request.body.clone();
            if request.reply(body, deadline()).await.is_err() {
                break;
            }
        }
    });
    let mut times = Vec::new();
    for _ in 0..500 {
        let start = Instant::now();
        let body = Bytes::from_static(b"ping");
        broker.request(address, body, deadline()).await?;
        times.push(start.elapsed());
    }
    answering.abort();
    times.sort_unstable();
    let (p50, p99) = (percentile(&times, 50), percentile(&times, 99));
    output.json(&json!({
        "what": "request and answer",
        "p50_us": p50.as_secs_f64() * 1e6,
        "p99_us": p99.as_secs_f64() * 1e6,
    }));
    output.say(format_args!(
        "{:32} {:>10} p50, {} p99",
        "request and answer",
        output::took(p50),
        output::took(p99)
    ));
    Ok(())
}
