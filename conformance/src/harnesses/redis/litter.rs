//! Entries that no wilco wrote, in the server's own words.

use std::io;

use super::Raw;

/// Appends each piece to this stream, and says how many.
pub(super) async fn append(raw: &mut Raw, stream: &str) -> io::Result<usize> {
    let many: Vec<Vec<u8>> = (0..10_000).map(|n| format!("f{n}").into_bytes()).collect();
    let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
    let pieces: [&[&[u8]]; 9] = [
        &[b"\xFF\xFE", b"\xFF"],
        &[b"x", b"y"],
        &[b"id", b"", b"kind", b"", b"body", b""],
        &[
            b"id", b"a", b"id", b"b", b"kind", b"k", b"body", b"x", b"body", b"y",
        ],
        &[b"id", b"\xFF", b"kind", b"k", b"body", b"x"],
        &[
            b"id", b"c", b"kind", b"k", b"h:\xFF", b"\xFF", b"body", b"x",
        ],
        &[
            b"id",
            b"d",
            b"kind",
            b"k",
            b"from",
            b"wilco.q.\xFF",
            b"body",
            b"x",
        ],
        &[b"reason", b"dead", b"attempts", b"-1", b"body", b"x"],
        &many,
    ];
    for piece in pieces {
        let command = [&[&b"XADD"[..], stream.as_bytes(), b"*"], piece].concat();
        raw.ask_bytes(&command).await?;
    }
    Ok(pieces.len())
}
