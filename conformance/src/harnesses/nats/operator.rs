//! A server whose users are signed by an account, and that account by an operator: what credentials of
//! guests need.

use std::{fs, net::SocketAddr, path::Path};

use nkeys::KeyPair;
use serde_json::{Value, json};

/// Sets a server up in this directory. What comes back is the end of its configuration, and the options of
/// a control plane's URL.
pub(super) fn set_up(directory: &Path) -> Result<(String, String), String> {
    let (operator, system, account, signing) = (
        KeyPair::new_operator(),
        KeyPair::new_account(),
        KeyPair::new_account(),
        KeyPair::new_account(),
    );
    let accounts = directory.join("accounts");
    fs::create_dir(&accounts).map_err(|error| error.to_string())?;
    let write = |name: &str, text: &str| -> Result<String, String> {
        let path = directory.join(name);
        fs::write(&path, text).map_err(|error| error.to_string())?;
        Ok(path.display().to_string())
    };
    let itself = sign(&operator, &operator, "operator", json!({}))?;
    let limits = |storage: bool| {
        let mut limits = json!({
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
            "conn": -1, "leaf": -1,
        });
        if storage {
            for what in ["mem_storage", "disk_storage", "streams", "consumer"] {
                limits[what] = (-1).into();
            }
        }
        limits
    };
    for (key, claims) in [
        (&system, json!({ "limits": limits(false) })),
        (
            &account,
            json!({ "limits": limits(true), "signing_keys": [signing.public_key()] }),
        ),
    ] {
        let name = format!("accounts/{}.jwt", key.public_key());
        write(&name, &sign(&operator, key, "account", claims)?)?;
    }
    let user = |name: &str, by: &KeyPair| -> Result<String, String> {
        let user = KeyPair::new_user();
        let claims = json!({ "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {} });
        let token = sign(by, &user, "user", claims)?;
        let seed = seed(&user)?;
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        write(name, &text)
    };
    let options = [
        ("creds", user("admin.creds", &account)?),
        ("signing_key", write("signing.seed", &seed(&signing)?)?),
        ("operator_key", write("operator.seed", &seed(&operator)?)?),
        ("system_creds", user("system.creds", &system)?),
    ];
    let options: Vec<_> = options
        .iter()
        .map(|(name, path)| format!("{name}={path}"))
        .collect();
    let configuration = format!(
        "operator: \"{itself}\"\nsystem_account: \"{}\"\nresolver {{ type: full, dir: \"{}\" }}\n",
        system.public_key(),
        accounts.display()
    );
    Ok((configuration, format!("/?{}", options.join("&"))))
}

/// Whether it takes connections: it says more to nobody unknown.
pub(super) async fn is_up(address: SocketAddr) -> bool {
    tokio::net::TcpStream::connect(address).await.is_ok()
}

fn seed(key: &KeyPair) -> Result<String, String> {
    key.seed().map_err(|error| error.to_string())
}

/// NATS's signed claims.
fn sign(by: &KeyPair, whom: &KeyPair, sort: &str, mut nats: Value) -> Result<String, String> {
    nats["type"] = sort.into();
    nats["version"] = 2.into();
    let claims = json!({
        "jti": whom.public_key(), "iat": 1, "iss": by.public_key(), "sub": whom.public_key(),
        "name": sort, "nats": nats,
    });
    let header = encode(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#);
    let text = format!("{header}.{}", encode(claims.to_string().as_bytes()));
    let signature = by
        .sign(text.as_bytes())
        .map_err(|error| error.to_string())?;
    Ok(format!("{text}.{}", encode(&signature)))
}

fn encode(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let mut padded = [0; 4];
        padded[1..=three.len()].copy_from_slice(three);
        let bits = u32::from_be_bytes(padded);
        for place in 0..=three.len() {
            text.push(char::from(
                LETTERS[(bits >> (18 - 6 * place) & 63) as usize],
            ));
        }
    }
    text
}
