//! NATS's signed claims, as far as credentials need them: a header, a JSON body, and an Ed25519 signature,
//! each in base64 for URLs.

use nkeys::KeyPair;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::form;
use crate::error::{Error, ErrorKind, Result};

const HEADER: &str = r#"{"typ":"JWT","alg":"ed25519-nkey"}"#;

/// Signs claims in this key's name; their id follows from what they say.
pub(super) fn sign(mut claims: Value, by: &KeyPair) -> Result<String> {
    claims["iss"] = by.public_key().into();
    if let Some(claims) = claims.as_object_mut() {
        claims.remove("jti");
    }
    let digest = Sha256::digest(claims.to_string());
    claims["jti"] = json!(encode(&digest));
    let text = format!(
        "{}.{}",
        encode(HEADER.as_bytes()),
        encode(claims.to_string().as_bytes())
    );
    let signature = by
        .sign(text.as_bytes())
        .map_err(|error| Error::new(ErrorKind::Internal, format!("nothing is signed: {error}")))?;
    Ok(format!("{text}.{}", encode(&signature)))
}

/// What a token claims; whether it may is for the server to say.
pub(super) fn claims(token: &str) -> Option<Value> {
    let body = token.trim().split('.').nth(1)?;
    let body = body.replace('-', "+").replace('_', "/");
    serde_json::from_slice(&form::base64(&body)?).ok()
}

/// A credentials file's text.
pub(super) fn file(token: &str, seed: &str) -> String {
    format!(
        "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

/// The token in a credentials file.
pub(super) fn token(file: &str) -> Option<&str> {
    let mut lines = file.lines();
    lines.find(|line| line.contains("BEGIN NATS USER JWT"))?;
    lines.next().map(str::trim)
}

fn encode(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let padded = [
            three[0],
            *three.get(1).unwrap_or(&0),
            *three.get(2).unwrap_or(&0),
        ];
        let bits = u32::from_be_bytes([0, padded[0], padded[1], padded[2]]);
        for place in 0..=three.len() {
            let six = bits >> (18 - 6 * place) & 63;
            text.push(char::from(LETTERS[six as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_signed_is_read_back() {
        let key = KeyPair::new_account();
        let text = sign(json!({ "sub": "a-ö", "nats": { "n": 1 } }), &key).unwrap();
        let read = claims(&text).unwrap();
        assert_eq!(read["iss"], key.public_key());
        assert_eq!(read["sub"], "a-ö");
        let (signed, signature) = text.rsplit_once('.').unwrap();
        let signature = signature.replace('-', "+").replace('_', "/");
        let signature = form::base64(&signature).unwrap();
        key.verify(signed.as_bytes(), &signature).unwrap();
        assert_eq!(token(&file(&text, "SU")), Some(text.as_str()));
        assert_eq!(claims("x"), None);
    }
}
