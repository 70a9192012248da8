//! A message as a row.

use std::sync::LazyLock;

use rusqlite::{Row, types::ValueRef};

use crate::{
    error::{Error, ErrorKind, Result},
    message::{Headers, Message, MessageId},
    sqlite::Fault,
};

/// The content type that is not written out.
pub(super) const JSON: &str = "application/json";

static JSON_TYPE: LazyLock<MessageId> =
    LazyLock::new(|| MessageId::new(JSON).expect("a content type is well formed"));

/// The columns that [`read_message`] reads.
pub(super) const MESSAGE: &str = "id, kind, content_type, headers, sender, body";

/// Reads the columns of [`MESSAGE`], from this one on.
pub(super) fn read_message(row: &Row<'_>, at: usize) -> Result<Message, Fault> {
    let foreign = |error: Error| {
        Error::new(
            ErrorKind::Internal,
            format!("the database holds what wilco did not write: {error}"),
        )
    };
    let id = |at: usize| -> Result<MessageId, Fault> {
        let text = row.get_ref(at)?.as_str().map_err(rusqlite::Error::from)?;
        Ok(MessageId::new(text).map_err(foreign)?)
    };
    Ok(Message {
        id: id(at)?,
        kind: id(at + 1)?,
        content_type: match row.get_ref(at + 2)? {
            ValueRef::Null => JSON_TYPE.clone(),
            _ => id(at + 2)?,
        },
        headers: match row.get::<_, Option<String>>(at + 3)? {
            None => Headers::new(),
            Some(headers) => serde_json::from_str(&headers)
                .map_err(|error| foreign(Error::new(ErrorKind::Internal, error.to_string())))?,
        },
        from: match row.get::<_, Option<String>>(at + 4)? {
            None => None,
            Some(sender) => Some(sender.parse().map_err(foreign)?),
        },
        body: row.get::<_, Vec<u8>>(at + 5)?.into(),
    })
}
