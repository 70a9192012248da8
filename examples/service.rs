//! A service that embeds a taskmanager: machines are provisioned over HTTP, and it tells how it is.
//!
//! `cargo run --example service --features metrics -- sqlite:example.db 127.0.0.1:8080`
//!
//! | request | what it does |
//! | --- | --- |
//! | `PUT /guests/{id}`, a JSON body | provisions: the body is what prepare is to do. 202, at once |
//! | `GET /guests/{id}` | how far it is, and its outcome |
//! | `DELETE /guests/{id}` | gives it up, and waits until that holds |
//! | `GET /metrics` | for Prometheus |
//! | `GET /health/live`, `GET /health/ready` | for the probes of an orchestrator |
//!
//! Whatever kills it, what it answered 202 to goes on when it is started again.

#![allow(clippy::print_stderr)]

use std::time::Duration;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde_json::{Value, json};
use wilco::{ErrorKind, GuestId, Record, SqliteRecords, Taskmanager, TraceContext};

#[derive(Clone)]
struct Service {
    taskmanager: Taskmanager,
    metrics: PrometheusHandle,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let broker = arguments.next().unwrap_or("sqlite:example.db".into());
    let listen = arguments.next().unwrap_or("127.0.0.1:8080".into());

    // Before the taskmanager: it counts what it resumes.
    let metrics = PrometheusBuilder::new().install_recorder()?;
    let broker = wilco::connect(&broker).await?;
    let records = SqliteRecords::open("example-records.db").await?;
    let taskmanager = Taskmanager::new(broker.clone(), records).await?; // resumes what a crash left

    let service = Service {
        taskmanager: taskmanager.clone(),
        metrics,
    };
    let routes = Router::new()
        .route("/guests/{id}", get(show).put(provision).delete(give_up))
        .route("/metrics", get(render))
        .route("/health/live", get(async || "alive\n"))
        .route("/health/ready", get(ready))
        .with_state(service);
    let listener = tokio::net::TcpListener::bind(listen).await?;
    // Port 0 asks for a free one: say which it is.
    eprintln!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, routes)
        .with_graceful_shutdown(async { _ = tokio::signal::ctrl_c().await })
        .await?;
    taskmanager.close();
    broker
        .close(wilco::Deadline::after(Duration::from_secs(10)))
        .await?;
    Ok(())
}

async fn provision(
    State(service): State<Service>,
    Path(id): Path<String>,
    headers: HeaderMap,
    Json(prepare): Json<Value>,
) -> Result<Response, Refusal> {
    let mut provision = service.taskmanager.provision(id.as_str(), prepare);
    // The caller's trace goes on through the taskmanager to the guest.
    if let Some(parent) = headers.get("traceparent").and_then(|it| it.to_str().ok())
        && let Ok(trace) = TraceContext::new(parent, None)
    {
        provision = provision.trace(trace);
    }
    let record = provision.start().await?;
    Ok((StatusCode::ACCEPTED, Json(view(&record))).into_response())
}

async fn show(State(service): State<Service>, Path(id): Path<String>) -> Result<Response, Refusal> {
    Ok(
        match service.taskmanager.record(&GuestId::new(id)?).await? {
            Some(record) => Json(view(&record)).into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        },
    )
}

async fn give_up(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    let cancelled = service.taskmanager.cancel(&GuestId::new(id)?).await?;
    Ok(Json(json!({ "cancelled": format!("{cancelled:?}") })))
}

async fn render(State(service): State<Service>) -> String {
    service.metrics.render()
}

async fn ready(State(service): State<Service>) -> impl IntoResponse {
    let health = service.taskmanager.health(Duration::from_secs(2)).await;
    let status = if health.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health))
}

/// Not the payload: it may hold passwords.
fn view(record: &Record) -> Value {
    json!({
        "guest": record.address.to_string(),
        "state": record.state,
        "trace": record.trace,
        "outcome": record.outcome,
    })
}

struct Refusal(wilco::Error);

impl From<wilco::Error> for Refusal {
    fn from(error: wilco::Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.0.kind() {
            ErrorKind::InvalidName | ErrorKind::InvalidInput => StatusCode::BAD_REQUEST,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(json!({ "error": self.0.to_string() }))).into_response()
    }
}
