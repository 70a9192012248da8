//! `wilco credentials`: what one machine connects to the broker with.

use std::{path::Path, process::ExitCode};

use secrecy::ExposeSecret as _;
use serde_json::json;
use wilco::{GuestCredential, GuestId};

use super::{
    args::{CredentialFormat, CredentialsAction, Global},
    output::{self, Output},
    place::patience,
    problem::{Exit, Outcome, Problem},
};

pub(super) async fn run(global: &Global, action: CredentialsAction, output: Output) -> Outcome {
    match action {
        CredentialsAction::Issue {
            id,
            format,
            directory,
        } => issue(global, &id, format, &directory, output).await,
        CredentialsAction::Show { id } => show(global, &id, output).await,
        CredentialsAction::Revoke { id } => revoke(global, &id, output).await,
    }
}

async fn issue(
    global: &Global,
    id: &GuestId,
    format: CredentialFormat,
    directory: &Path,
    output: Output,
) -> Outcome {
    global.needed_records().await?;
    let taskmanager = global.observe().await?;
    let credential = taskmanager.issue_credential(id).await?;
    let format = if output.json {
        CredentialFormat::Json
    } else {
        format
    };
    output::raw(text(&credential, format, directory).as_bytes());
    if format != CredentialFormat::Json {
        for right in &credential.rights {
            output::note(format_args!("it may {right}"));
        }
        for exception in &credential.exceptions {
            output::note(format_args!("beyond that: {exception}"));
        }
        if let Some(expires) = credential.expires {
            output::note(format_args!(
                "it expires at {}",
                humantime::format_rfc3339_seconds(expires)
            ));
        }
        output::note("its secret is not shown again; issued again, it is another one");
    }
    Ok(ExitCode::SUCCESS)
}

fn text(credential: &GuestCredential, format: CredentialFormat, directory: &Path) -> String {
    let url = credential.url_in(directory);
    let url = url.expose_secret();
    let id = &credential.address.guest;
    let incarnation = credential.address.incarnation;
    let env = format!(
        "WILCO_BROKER={}\nWILCO_GUEST={}\nWILCO_INCARNATION={incarnation}\n",
        quoted(url),
        quoted(id.as_str())
    );
    match format {
        CredentialFormat::Url => format!("{url}\n"),
        CredentialFormat::Env => env,
        CredentialFormat::CloudInit => {
            let mut text = String::from("#cloud-config\nwrite_files:\n");
            let env_file = directory.join("wilco.env");
            let files = credential
                .files()
                .iter()
                .map(|file| (directory.join(file.name()), file.content().expose_secret()));
            for (path, content) in std::iter::once((env_file, env.as_str())).chain(files) {
                // JSON is YAML, whatever is in the text.
                let entry = json!({
                    "path": path.display().to_string(),
                    "permissions": "0600",
                    "owner": "root:root",
                    "content": content,
                });
                text.push_str(&format!("  - {entry}\n"));
            }
            text
        }
        CredentialFormat::Json => {
            let files: Vec<_> = credential
                .files()
                .iter()
                .map(|file| {
                    json!({
                        "path": directory.join(file.name()).display().to_string(),
                        "content": file.content().expose_secret(),
                    })
                })
                .collect();
            let expires = credential
                .expires
                .map(|expires| humantime::format_rfc3339_seconds(expires).to_string());
            let object = json!({
                "guest": id,
                "incarnation": incarnation,
                "broker": url,
                "files": files,
                "rights": credential.rights,
                "exceptions": credential.exceptions,
                "expires": expires,
            });
            format!("{object}\n")
        }
    }
}

/// As systemd and shells read it: a URL has no quote in it, an id may have any letter.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for letter in text.chars() {
        if matches!(letter, '"' | '\\' | '$' | '`') {
            quoted.push('\\');
        }
        quoted.push(letter);
    }
    quoted.push('"');
    quoted
}

async fn show(global: &Global, id: &GuestId, output: Output) -> Outcome {
    let address = global.address(id, None).await?;
    let broker = global.connect_shared().await?;
    let issued = broker.credentials(patience()).await?;
    let exists = issued.contains(&address.queue());
    output.json(&json!({
        "guest": id,
        "incarnation": address.incarnation,
        "issued": exists,
    }));
    if exists {
        output.say(format_args!(
            "{address} has a credential: it may attach to its own queue, settle, answer and report"
        ));
        return Ok(ExitCode::SUCCESS);
    }
    Err(Problem::new(
        Exit::Missing,
        format!("{address} has no credential"),
    ))
}

async fn revoke(global: &Global, id: &GuestId, output: Output) -> Outcome {
    let address = global.address(id, None).await?;
    let broker = global.connect_shared().await?;
    broker.revoke_credential(&address, patience()).await?;
    output.json(&json!({
        "guest": id,
        "incarnation": address.incarnation,
        "revoked": true,
    }));
    output.say(format_args!("{address} has no credential any more"));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential() -> GuestCredential {
        GuestCredential::new(
            GuestId::new("vm \"$1").unwrap().into(),
            "nats://h/?creds=c.creds",
        )
        .with_file("c.creds", "line 1\nline: 2\n")
    }

    #[test]
    fn the_formats_name_the_files_where_they_will_be() {
        let text = |format| text(&credential(), format, Path::new("/etc/wilco"));
        assert_eq!(
            text(CredentialFormat::Url),
            "nats://h/?creds=/etc/wilco/c.creds\n"
        );
        let env = text(CredentialFormat::Env);
        assert!(env.contains("WILCO_GUEST=\"vm \\\"\\$1\"\n"), "{env}");
        let user_data = text(CredentialFormat::CloudInit);
        let entries: Vec<serde_json::Value> = user_data
            .lines()
            .filter_map(|line| serde_json::from_str(line.strip_prefix("  - ")?).ok())
            .collect();
        assert_eq!(entries.len(), 2, "{user_data}");
        assert_eq!(entries[1]["path"], "/etc/wilco/c.creds");
        assert_eq!(entries[1]["content"], "line 1\nline: 2\n");
        assert_eq!(entries[0]["permissions"], "0600");
    }
}
