//! Reads a fleet file: one guest a line, strictly, each line on its own.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    io::{self, BufRead, BufReader, Read as _},
    path::Path,
    time::Duration,
};

use serde::Deserialize;
use serde_json::value::RawValue;
use wilco::GuestId;

use super::problem::{Exit, Outcome, Problem};

/// The longest line: no prepare may be larger (`MAX_BODY_BYTES`), and what stands around it is small.
const MAX_LINE_BYTES: usize = wilco::wire::MAX_BODY_BYTES;

/// One guest of a fleet file.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) id: GuestId,
    pub(super) prepare: Box<RawValue>,
    pub(super) deadlines: Deadlines,
    pub(super) policy: Policy,
    pub(super) env: BTreeMap<String, String>,
}

/// How long each stage may take; the library's default where it is not said.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    pub(super) boot: Option<Duration>,
    pub(super) accept: Option<Duration>,
    pub(super) progress: Option<Duration>,
    pub(super) total: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Policy {
    #[default]
    PingFirst,
    EnqueueFirst,
}

/// A line before its values are read: each one is where it stands, so that an error can say where.
#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with id and prepare, and if you like deadlines, policy, env"
)]
struct Raw<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
    #[serde(borrow)]
    prepare: &'a RawValue,
    #[serde(borrow)]
    deadlines: Option<&'a RawValue>,
    #[serde(borrow)]
    policy: Option<&'a RawValue>,
    #[serde(borrow)]
    env: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an object with boot, accept, progress, total"
)]
struct RawDeadlines<'a> {
    #[serde(borrow)]
    boot: Option<&'a RawValue>,
    #[serde(borrow)]
    accept: Option<&'a RawValue>,
    #[serde(borrow)]
    progress: Option<&'a RawValue>,
    #[serde(borrow)]
    total: Option<&'a RawValue>,
}

/// A fleet file as read: the good lines, and what is wrong with the others.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    pub(super) guests: Vec<Line>,
    pub(super) malformed: Vec<Malformed>,
}

/// What is wrong with one line, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) what: String,
}

/// Reads a file, or stdin for `-`.
pub(super) fn read(path: &Path) -> Outcome<Fleet> {
    let read = if path == Path::new("-") {
        parse(std::io::stdin().lock())
    } else {
        std::fs::File::open(path).and_then(|file| parse(BufReader::new(file)))
    };
    read.map_err(|error| {
        Problem::new(
            Exit::File,
            format!(
                "cannot read the fleet file {}: {error}; expected a file with one guest a line, in JSON",
                path.display()
            ),
        )
    })
}

/// Reads line by line: of a line that is too long no more is kept than that (law S2).
pub(super) fn parse(mut source: impl BufRead) -> io::Result<Fleet> {
    let mut fleet = Fleet::default();
    let mut seen = HashMap::new();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let most = MAX_LINE_BYTES as u64 + 1;
        if source.by_ref().take(most).read_until(b'\n', &mut bytes)? == 0 {
            break;
        }
        if bytes.len() > MAX_LINE_BYTES && bytes.last() != Some(&b'\n') {
            source.skip_until(b'\n')?;
            fleet.malformed.push(Malformed {
                line,
                column: 1,
                what: format!(
                    "this line has more than {MAX_LINE_BYTES} bytes, expected no more than that"
                ),
            });
            continue;
        }
        let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let text = match line {
            1 => text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text),
            _ => text,
        };
        match parse_line(text, line, &mut seen) {
            Ok(guest) => fleet.guests.extend(guest),
            Err((column, what)) => fleet.malformed.push(Malformed { line, column, what }),
        }
    }
    Ok(fleet)
}

/// The guest of one line; none for an empty line.
fn parse_line(
    bytes: &[u8],
    number: usize,
    seen: &mut HashMap<GuestId, usize>,
) -> Result<Option<Line>, (usize, String)> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let good = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let what = "this is not UTF-8, expected JSON in UTF-8".to_owned();
        (good.chars().count() + 1, what)
    })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let place = Place(text);
    let raw: Raw<'_> = place.object(text)?;
    let id: String = place.read(raw.id.get())?;
    let id = GuestId::new(id).map_err(|error| place.at(raw.id.get(), error.to_string()))?;
    let deadlines = raw
        .deadlines
        .map(|raw| place.object::<RawDeadlines<'_>>(raw.get()));
    let deadlines = deadlines.transpose()?.unwrap_or_default();
    let line = Line {
        prepare: raw.prepare.to_owned(),
        deadlines: Deadlines {
            boot: place.duration(deadlines.boot)?,
            accept: place.duration(deadlines.accept)?,
            progress: place.duration(deadlines.progress)?,
            total: place.duration(deadlines.total)?,
        },
        policy: raw
            .policy
            .map(|raw| place.read(raw.get()))
            .transpose()?
            .unwrap_or_default(),
        env: raw
            .env
            .map(|raw| place.env(raw))
            .transpose()?
            .unwrap_or_default(),
        id,
    };
    if let Some(first) = seen.get(&line.id) {
        let what = format!(
            "line {first} has the guest {:?} already, expected each id once",
            line.id
        );
        return Err(place.at(raw.id.get(), what));
    }
    seen.insert(line.id.clone(), number);
    Ok(Some(line))
}

/// Reads the values of one line, and knows where they stand: in characters, from 1.
#[derive(Clone, Copy)]
struct Place<'a>(&'a str);

impl Place<'_> {
    /// Reads a part of the line.
    fn read<'b, T: Deserialize<'b>>(self, part: &'b str) -> Result<T, (usize, String)> {
        serde_json::from_str(part).map_err(|error| {
            // serde_json counts bytes and stands behind a value; a value's beginning is clearer.
            let inside = if part.starts_with(['{', '[']) || part.len() == self.0.len() {
                error.column().saturating_sub(1)
            } else {
                0
            };
            (self.column(part, inside), what(&error))
        })
    }

    /// The same for an object: serde would take an array with the fields in order too.
    fn object<'b, T: Deserialize<'b>>(self, part: &'b str) -> Result<T, (usize, String)> {
        if part.trim_start().starts_with('[') {
            return Err(self.at(
                part.trim_start(),
                "found an array, expected an object".into(),
            ));
        }
        self.read(part)
    }

    fn duration(self, raw: Option<&RawValue>) -> Result<Option<Duration>, (usize, String)> {
        let Some(raw) = raw else { return Ok(None) };
        let text: Option<String> = serde_json::from_str(raw.get()).ok();
        match text.map(|text| humantime::parse_duration(&text)) {
            Some(Ok(duration)) if !duration.is_zero() => Ok(Some(duration)),
            _ => {
                let what = format!(
                    "expected a duration such as \"500ms\", \"90s\" or \"10m\", found {}",
                    raw.get()
                );
                Err(self.at(raw.get(), what))
            }
        }
    }

    fn env(self, raw: &RawValue) -> Result<BTreeMap<String, String>, (usize, String)> {
        let env: BTreeMap<String, String> = self.read(raw.get())?;
        match env
            .keys()
            .find(|name| name.is_empty() || name.contains(['=', '\0']))
        {
            None => Ok(env),
            Some(name) => {
                let what = format!("expected names of environment variables, found {name:?}");
                Err(self.at(raw.get(), what))
            }
        }
    }

    fn at(self, part: &str, what: String) -> (usize, String) {
        (self.column(part, 0), what)
    }

    /// The column of this many bytes into a part of the line.
    fn column(self, part: &str, inside: usize) -> usize {
        let start = part.as_ptr().addr().saturating_sub(self.0.as_ptr().addr());
        let before = self.0.bytes().take(start + inside);
        before.filter(|byte| byte & 0xC0 != 0x80).count() + 1
    }
}

/// What serde_json says, without the position that stands in front of it already.
fn what(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(what, _)| what);
    if error.is_eof() {
        format!("{text}: the line ends too early, expected one whole JSON object")
    } else if text == "trailing comma" {
        format!("{text}, expected another field after it")
    } else if text.contains("expected") || text.contains("missing") {
        text.to_owned()
    } else {
        format!("{text}; expected one JSON object with id and prepare")
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, what } = self;
        write!(f, "line {line}, column {column}: {what}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only_error(text: &str) -> Malformed {
        let mut fleet = parse(text.as_bytes()).unwrap();
        assert_eq!(fleet.malformed.len(), 1, "{fleet:?}");
        fleet.malformed.remove(0)
    }

    #[test]
    fn good_lines_are_read_whatever_stands_around_them() {
        let text = concat!(
            "\u{feff}{\"id\":\"a\",\"prepare\":{ \"x\": 1.0 }}\r\n",
            "\n",
            "{\"id\":\"b\"\n",
            "{\"id\":\"c\",\"prepare\":null,\"policy\":\"enqueue_first\",",
            "\"deadlines\":{\"boot\":\"2m\"},\"env\":{\"A\":\"1\"}}"
        );
        let fleet = parse(text.as_bytes()).unwrap();
        let ids: Vec<_> = fleet.guests.iter().map(|line| line.id.as_str()).collect();
        assert_eq!(ids, ["a", "c"]);
        assert_eq!(fleet.guests[0].prepare.get(), "{ \"x\": 1.0 }");
        assert_eq!(fleet.guests[1].policy, Policy::EnqueueFirst);
        let boot = fleet.guests[1].deadlines.boot;
        assert_eq!(boot, Some(Duration::from_secs(120)));
        assert_eq!(fleet.malformed.len(), 1);
        assert_eq!(fleet.malformed[0].line, 3);
    }

    #[test]
    fn s2_of_a_line_without_end_no_more_is_kept_than_a_line_may_have() {
        let good = "{\"id\":\"a\",\"prepare\":1}\n";
        let endless = io::repeat(b' ').take(1 << 26);
        let text = good.as_bytes().chain(endless).chain(&b"\n"[..]);
        let last = good.replace("\"a\"", "\"b\"");
        let fleet = parse(BufReader::new(text.chain(last.as_bytes()))).unwrap();
        let ids: Vec<_> = fleet.guests.iter().map(|line| line.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        assert_eq!(fleet.malformed.len(), 1);
        assert_eq!(fleet.malformed[0].line, 2);
        assert!(fleet.malformed[0].what.contains("16777216 bytes"));
    }

    #[test]
    fn an_error_says_where_and_what_was_expected() {
        for (text, column, expected) in [
            (
                "{\"id\":\"a\",\"prepare\":1,}",
                23,
                "trailing comma, expected another field",
            ),
            (
                "{\"id\":\"a\",\"prepare\":1,\"deadline\":{}}",
                32,
                "expected one of `id`, `prepare`, `deadlines`, `policy`, `env`",
            ),
            ("{\"prepare\":1}", 13, "missing field `id`"),
            ("{\"id\":\"\",\"prepare\":1}", 7, "at least one character"),
            (
                "{\"id\":\"é\",\"prepare\":1,\"deadlines\":{\"boot\":\"soon\"}}",
                43,
                "expected a duration such as",
            ),
            (
                "{\"id\":\"a\",\"prepare\":1,\"policy\":\"best\"}",
                32,
                "expected `ping_first` or `enqueue_first`",
            ),
            ("[1]", 1, "expected an object"),
            ("  7", 3, "expected an object with id and prepare"),
            ("{\"id\":\"a\",\"prepare\":{\"b\":", 25, "ends too early"),
            ("{\"id\":\"a\",\"prepare\":1} x", 24, "trailing characters"),
        ] {
            let error = only_error(text);
            assert!(error.what.contains(expected), "{text}: {error}");
            assert_eq!(error.column, column, "{text}: {error}");
            assert!(!error.what.contains(" at line "), "{error}");
        }
    }

    #[test]
    fn the_later_of_two_lines_with_one_id_is_the_error() {
        let text = "{\"id\":\"a\",\"prepare\":1}\n{\"prepare\":2,\"id\":\"a\"}\n";
        let error = only_error(text);
        assert_eq!((error.line, error.column), (2, 19));
        assert!(error.what.contains("line 1"), "{error}");
    }

    #[test]
    fn bytes_that_are_not_utf8_are_one_bad_line() {
        let fleet = parse(&b"{\"id\":\"a\",\"prepare\":1}\n{\"id\":\"\xff\"}\n"[..]).unwrap();
        assert_eq!(fleet.guests.len(), 1);
        assert_eq!((fleet.malformed[0].line, fleet.malformed[0].column), (2, 8));
    }
}
