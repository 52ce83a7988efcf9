//! Text from others, made safe to display.

use std::fmt::{self, Write};

/// Displays text that somebody else wrote. Characters that would move, hide or forge the text
/// around them appear as code points.
///
/// An approval is worth what its reader saw. Some characters control a terminal, reverse the
/// direction of text (CVE-2021-42574, "Trojan Source"), or show nothing, so a reader sees something
/// other than what is on record. They are written as `\u{202E}`, and of the controls `\n`, `\r` and
/// `\t` as such. This covers all control characters; bidirectional controls; characters without
/// width or ignored by default, such as zero-width spaces and joiners, soft hyphens, variation
/// selectors, tag characters and fillers; spaces other than the ASCII one; line and paragraph
/// separators; private and unassigned characters; and a combining mark with nothing before it to
/// combine with.
///
/// Letters that only look alike are kept, and so are backslashes in the text. The result is for
/// reading and cannot be converted back.
///
/// ```
/// use aegis_hitl::protocol::Escaped;
///
/// let payload = "{\"to\": \"\u{202e}moc.elpmaxe@a\"}";
/// assert_eq!(Escaped::line(payload).to_string(), r#"{"to": "\u{202E}moc.elpmaxe@a"}"#);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Escaped<'a> {
    text: &'a str,
    form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Line,
    Lines,
    Json,
}

impl<'a> Escaped<'a> {
    /// Displays text on one line, where a second line could pass for somebody else's: in a log, a
    /// table or a message.
    pub fn line(text: &'a str) -> Self {
        let form = Form::Line;
        Self { text, form }
    }

    /// Displays text on its own lines, with its tabs, where no other text stands beside it.
    pub fn lines(text: &'a str) -> Self {
        let form = Form::Lines;
        Self { text, form }
    }

    /// Displays JSON text on one line, as the same JSON: with JSON's escapes (`\u202e`), which
    /// every JSON parser decodes.
    pub fn json(text: &'a str) -> Self {
        let form = Form::Json;
        Self { text, form }
    }
}

/// A part of an escaped text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// Text as it was written.
    Kept(&'a str),
    /// What stands for one character.
    Escape(&'a str),
}

impl Escaped<'_> {
    /// Calls `take` with the parts of the text, in order.
    pub(crate) fn try_for_each<E>(
        &self,
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut kept = 0;
        let mut escape = String::new();
        for (at, character) in self.text.char_indices() {
            let joins_nothing = at == 0 && self.form != Form::Json && is_mark(character);
            if !joins_nothing && !is_deceptive(character)
                || self.form == Form::Lines && matches!(character, '\n' | '\t')
            {
                continue;
            }
            if kept < at {
                take(Piece::Kept(&self.text[kept..at]))?;
            }
            kept = at + character.len_utf8();
            escape.clear();
            self.escape(character, &mut escape);
            take(Piece::Escape(&escape))?;
        }
        match &self.text[kept..] {
            "" => Ok(()),
            rest => take(Piece::Kept(rest)),
        }
    }

    fn escape(&self, character: char, escape: &mut String) {
        // Writing to a string does not fail.
        let _ = match (self.form, character) {
            // JSON has these only between values, where a space means the same.
            (Form::Json, '\n' | '\r' | '\t') => escape.write_str(" "),
            (Form::Json, _) => character
                .encode_utf16(&mut [0; 2])
                .iter()
                .try_for_each(|unit| write!(escape, "\\u{unit:04x}")),
            (_, '\n') => escape.write_str("\\n"),
            (_, '\r') => escape.write_str("\\r"),
            (_, '\t') => escape.write_str("\\t"),
            _ => write!(escape, "\\u{{{:X}}}", u32::from(character)),
        };
    }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.try_for_each(|piece| match piece {
            Piece::Kept(text) | Piece::Escape(text) => f.write_str(text),
        })
    }
}

fn is_deceptive(character: char) -> bool {
    if character.is_ascii() {
        return character.is_ascii_control();
    }
    shows_nothing(character) || is_escaped_by_std(character, 'a')
}

/// Whether the standard library considers the character printable although it shows nothing: the
/// letters and marks among Unicode's `Default_Ignorable_Code_Point`, and three blank characters.
fn shows_nothing(character: char) -> bool {
    matches!(
        character,
        '\u{34f}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{2800}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{ffa0}'
            | '\u{16fe4}'
            | '\u{1d159}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

fn is_mark(character: char) -> bool {
    !character.is_ascii()
        && is_escaped_by_std(character, '\0')
        && !is_escaped_by_std(character, 'a')
}

/// Whether [`str::escape_debug`] escapes this non-ASCII character after `before`: everything in the
/// general categories C and Z, and a mark at the start of a text, for which `'\0'` stands.
fn is_escaped_by_std(character: char, before: char) -> bool {
    let mut buffer = [0; 5];
    let start = match before {
        '\0' => 0,
        before => before.encode_utf8(&mut buffer).len(),
    };
    let end = start + character.encode_utf8(&mut buffer[start..]).len();
    let text = std::str::from_utf8(&buffer[..end]).unwrap_or_default();
    text.escape_debug().nth(start) == Some('\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> String {
        Escaped::line(text).to_string()
    }

    /// The examples of "Trojan Source: Invisible Vulnerabilities" (Boucher and Anderson, 2021),
    /// CVE-2021-42574 and -42694.
    #[test]
    fn the_trojan_source_examples_show_what_they_are() {
        for (source, shown) in [
            // Stretched string.
            (
                "if (accessLevel != \"user\u{202e} \u{2066}// Check if admin\u{2069} \u{2066}\") {",
                r#"if (accessLevel != "user\u{202E} \u{2066}// Check if admin\u{2069} \u{2066}") {"#,
            ),
            // Commenting-out.
            (
                "/*\u{202e} } \u{2066}if (isAdmin)\u{2069} \u{2066} begin admins only */",
                r"/*\u{202E} } \u{2066}if (isAdmin)\u{2069} \u{2066} begin admins only */",
            ),
            // Early return.
            (
                "''' Subtract funds then \u{2067}''' ;return",
                r"''' Subtract funds then \u{2067}''' ;return",
            ),
            // Invisible function.
            ("is\u{200b}Admin()", r"is\u{200B}Admin()"),
        ] {
            assert_eq!(line(source), shown);
        }
        // A homoglyph is an ordinary letter: nothing here shows that it is Cyrillic.
        assert_eq!(line("say\u{41d}ello"), "say\u{41d}ello");
    }

    #[test]
    fn what_moves_hides_or_forges_text_is_shown_by_its_code_point() {
        let ranges = [
            0x00..=0x08,
            0x0b..=0x0c,
            0x0e..=0x1f,
            0x7f..=0x9f,
            0xa0..=0xa0,
            0xad..=0xad,
            0x34f..=0x34f,
            0x61c..=0x61c,
            0x115f..=0x1160,
            0x1680..=0x1680,
            0x17b4..=0x17b5,
            0x180b..=0x180f,
            0x2000..=0x200f,
            0x2028..=0x202f,
            0x205f..=0x206f,
            0x2800..=0x2800,
            0x3000..=0x3000,
            0x3164..=0x3164,
            0xe000..=0xf8ff,
            0xfdd0..=0xfdef,
            0xfe00..=0xfe0f,
            0xfeff..=0xfeff,
            0xffa0..=0xffa0,
            0xfff0..=0xfffb,
            0xfffe..=0xffff,
            0x1bca0..=0x1bca3,
            0x1d173..=0x1d17a,
            0x1fffe..=0x1ffff,
            0xe0000..=0xe0fff,
            0xf0000..=0x10ffff,
        ];
        for code in ranges.into_iter().flatten() {
            let character = char::from_u32(code).unwrap();
            let shown = format!("a\\u{{{code:X}}}b");
            let text = format!("a{character}b");
            assert_eq!(line(&text), shown);
            assert_eq!(Escaped::lines(&text).to_string(), shown);
        }
    }

    #[test]
    fn nothing_that_is_escaped_is_left_in_what_is_shown() {
        for character in '\0'..=char::MAX {
            let shown = line(&format!("{character}a{character}"));
            assert!(shown.chars().all(|shown| !is_deceptive(shown)), "{shown:?}");
            // Escaping twice is the same as escaping once.
            if !shown.starts_with(character) {
                assert_eq!(line(&shown), shown);
            }
        }
    }

    #[test]
    fn what_people_write_stays_as_it_is() {
        for text in [
            "",
            "plain text, \"quoted\" and 'quoted', C:\\new\\table",
            "Größe, naïve, e\u{301}te\u{301}, Ελληνικά, Русский",
            "العربية עברית",
            "हिन्दी தமிழ் ไทย",
            "漢字 かな 한국어",
            "🙂 → ∑ € ½",
        ] {
            assert_eq!(line(text), text);
        }
    }

    #[test]
    fn a_mark_has_something_to_combine_with() {
        assert_eq!(line("\u{301}a\u{301}"), "\\u{301}a\u{301}");
    }

    #[test]
    fn lines_and_tabs_stay_only_where_they_are_allowed() {
        let text = "a\n\tb\r\nc";
        assert_eq!(line(text), r"a\n\tb\r\nc");
        assert_eq!(Escaped::lines(text).to_string(), "a\n\tb\\r\nc");
    }

    #[cfg(feature = "client")]
    #[test]
    fn json_stays_the_same_json() {
        let text = "{\n\t\"a\u{202e}\": \"\u{e0041}\u{7f}\\n\u{301}\",\r\n\"b\":[\"\u{301}\"]}";
        let shown = Escaped::json(text).to_string();
        assert_eq!(
            shown,
            "{  \"a\\u202e\": \"\\udb40\\udc41\\u007f\\n\u{301}\",  \"b\":[\"\u{301}\"]}"
        );
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&shown), value(text));
    }
}
