//! `wilco keys`: the key that a control plane signs with, and its public half for the guests.

use std::process::ExitCode;

use serde_json::json;
use wilco::{PublicKey, SigningKey};

use super::{args::KeysAction, output::Output, problem::Outcome};

pub(super) fn run(action: KeysAction, output: Output) -> Outcome {
    let public = match action {
        KeysAction::Generate { file } => {
            let key = SigningKey::generate()?;
            key.save(file)?;
            key.public()
        }
        KeysAction::Public { file } => SigningKey::open(file)?.public(),
    };
    show(&public, output);
    Ok(ExitCode::SUCCESS)
}

fn show(public: &PublicKey, output: Output) {
    output.say(public);
    output.json(&json!({ "id": public.id(), "public": public.to_string() }));
}
