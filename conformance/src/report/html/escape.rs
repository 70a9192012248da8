//! Text in a page. What a broker says may hold anything, and stays text (law S2).

use std::fmt::{self, Write};

/// Text that is safe between tags and in quoted attributes. Characters that are not seen or that turn
/// the text around them are shown by their number.
pub(super) struct Text<'a>(pub(super) &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '`' => f.write_str("&#96;")?,
                '\n' => f.write_char(c)?,
                c if c.is_control() || turns_text(c) => write!(f, "\\u{{{:x}}}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

fn turns_text(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_turns_text_is_shown() {
        assert_eq!(Text("a\u{202e}b\0c").to_string(), "a\\u{202e}b\\u{0}c");
        assert_eq!(Text("<script>").to_string(), "&lt;script&gt;");
    }

    proptest! {
        /// Nothing in it can open a tag, end an attribute, or begin an entity of its own.
        #[test]
        fn s2_no_text_becomes_markup(text in any::<String>()) {
            let escaped = Text(&text).to_string();
            prop_assert!(!escaped.contains(['<', '>', '"', '\'', '`']));
            for (at, _) in escaped.match_indices('&') {
                let known = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&#96;"];
                prop_assert!(known.iter().any(|entity| escaped[at..].starts_with(entity)));
            }
        }

        /// Plain text is what it was.
        #[test]
        fn text_is_kept(text in "[a-zA-Z0-9 .,:;/äöü✓-]{0,80}") {
            prop_assert_eq!(Text(&text).to_string(), text);
        }
    }
}
