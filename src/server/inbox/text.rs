//! What others wrote, as HTML: escaped, with deceptive characters visible and long texts folded.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use similar::{ChangeTag, TextDiff};

use crate::protocol::{Escaped, Piece};

/// The longest string that is shown on the line of its member, in characters.
const INLINE: usize = 160;

/// The longest text that is not folded, in characters, and its most lines.
const UNFOLDED: usize = 2_000;
const UNFOLDED_LINES: usize = 40;

/// The beginning of a folded text, in characters.
const BEGINNING: usize = 120;

/// The time after which a diff stops to look for a shorter one.
const DIFF_TIME: Duration = Duration::from_millis(50);

/// The length of a diff, in bytes, after which no more changes are shown.
const LONGEST_DIFF: usize = 256 * 1024;

/// Deep nesting is not shown as such: it would make a page of many megabytes of a small payload.
const DEEPEST: usize = 12;

/// HTML that is safe to put into an element. It is no value of an attribute: quotes stay as they
/// are, which halves the page of a payload with many short strings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Html(String);

impl Html {
    /// Markup of our own.
    fn push(&mut self, markup: &str) {
        self.0.push_str(markup);
    }

    /// Text of whatever origin.
    fn push_text(&mut self, text: &str) {
        for character in text.chars() {
            match character {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                other => self.0.push(other),
            }
        }
    }

    fn push_escaped(&mut self, text: Escaped<'_>) {
        // Neighbours share their markup.
        let mut is_marked = false;
        let Ok(()) = text.try_for_each(|piece| {
            let (text, is_escape) = match piece {
                Piece::Kept(text) => (text, false),
                Piece::Escape(text) => (text, true),
            };
            if is_escape != is_marked {
                self.push(if is_escape { "<mark>" } else { "</mark>" });
                is_marked = is_escape;
            }
            self.push_text(text);
            Ok::<(), std::convert::Infallible>(())
        });
        if is_marked {
            self.push("</mark>");
        }
    }

    /// Shows a text on one line.
    pub(crate) fn line(text: &str) -> Self {
        let mut html = Self::default();
        html.push_escaped(Escaped::line(text));
        html
    }

    /// Shows a text on its own lines, folded if it is long.
    pub(crate) fn lines(text: &str) -> Self {
        let mut html = Self::default();
        html.push_lines(text);
        html
    }

    fn push_lines(&mut self, text: &str) {
        let (characters, lines) = (text.chars().count(), text.lines().count());
        let is_long = characters > UNFOLDED || lines > UNFOLDED_LINES;
        if is_long {
            let beginning: String = text.chars().take(BEGINNING).collect();
            self.push("<details class=\"long\"><summary>");
            self.push_escaped(Escaped::line(&beginning));
            self.push(&format!(
                "… <span class=\"size\">{characters} characters, {lines} {}</span></summary>",
                if lines == 1 { "line" } else { "lines" }
            ));
        }
        self.push("<span class=\"text\">");
        self.push_escaped(Escaped::lines(text));
        self.push("</span>");
        if is_long {
            self.push("</details>");
        }
    }

    /// Shows JSON, a member or an element on each line, indented by tabs.
    pub(crate) fn json(json: &str) -> Self {
        let mut html = Self::default();
        // A block has its own lines, so that no punctuation follows it on the same one.
        let mut is_after_block = false;
        // The elements of an array share their markup, with what is between them.
        let mut is_literal = false;
        let mut between = String::new();
        for token in Tokens::of(json) {
            match token {
                Token::Mark(",") if is_after_block => continue,
                Token::Mark(text) => between.push_str(text),
                Token::Break(depth) => {
                    if !is_after_block {
                        between.push('\n');
                    }
                    between.extend(std::iter::repeat_n('\t', depth.min(DEEPEST)));
                }
                Token::Literal(text) => {
                    if !is_literal || between.contains(|it: char| !",\n\t".contains(it)) {
                        html.close(&mut is_literal, &mut between);
                        html.push("<b>");
                        is_literal = true;
                    }
                    html.push(&between);
                    between.clear();
                    html.push_escaped(Escaped::line(text));
                }
                Token::Name(text) => {
                    html.close(&mut is_literal, &mut between);
                    html.push("<i>");
                    html.push_escaped(Escaped::line(&quoted(text)));
                    html.push("</i>");
                }
                Token::String(text) => {
                    html.close(&mut is_literal, &mut between);
                    is_after_block = html.push_string(text);
                    continue;
                }
            }
            is_after_block = false;
        }
        html.close(&mut is_literal, &mut between);
        html
    }

    /// Ends a run of literals, and writes what is between it and what follows.
    fn close(&mut self, is_literal: &mut bool, between: &mut String) {
        if std::mem::take(is_literal) {
            self.push("</b>");
        }
        // Punctuation of our own, and white space.
        self.push(between);
        between.clear();
    }

    /// Shows a string. Returns whether it became a block.
    fn push_string(&mut self, json: &str) -> bool {
        let text: String = serde_json::from_str(json).unwrap_or_else(|_| json.to_owned());
        let is_inline = !text.contains('\n') && text.chars().nth(INLINE).is_none();
        if is_inline {
            self.push_escaped(Escaped::line(&quoted(json)));
        } else {
            self.push("<span class=\"block\">");
            self.push_lines(&text);
            self.push("</span>");
        }
        !is_inline
    }

    /// Shows how one JSON text became another, line by line. Returns whether all changes are shown.
    pub(crate) fn diff(old: &str, new: &str) -> (Self, bool) {
        let [old, new] = [old, new].map(|json| pretty(json, "\t"));
        let diff = TextDiff::configure()
            .timeout(DIFF_TIME)
            .diff_lines(&old, &new);
        let mut html = Self::default();
        // Neighbours share their markup.
        let mut tag = ChangeTag::Equal;
        let mut turn_to = |html: &mut Self, next: ChangeTag| {
            if tag != next {
                html.push(match tag {
                    ChangeTag::Delete => "</del>",
                    ChangeTag::Insert => "</ins>",
                    ChangeTag::Equal => "",
                });
                html.push(match next {
                    ChangeTag::Delete => "<del>",
                    ChangeTag::Insert => "<ins>",
                    ChangeTag::Equal => "",
                });
                tag = next;
            }
        };
        let mut is_whole = true;
        let mut hunks = diff.unified_diff();
        hunks.context_radius(2);
        'shown: for hunk in hunks.iter_hunks() {
            for change in hunk.iter_changes() {
                if html.0.len() > LONGEST_DIFF {
                    is_whole = false;
                    break 'shown;
                }
                turn_to(&mut html, change.tag());
                html.push(match change.tag() {
                    ChangeTag::Delete => "- ",
                    ChangeTag::Insert => "+ ",
                    ChangeTag::Equal => "  ",
                });
                let line = change.value();
                let line = line.strip_suffix('\n').unwrap_or(line);
                let text = line.trim_start_matches('\t');
                html.push(&line[..line.len() - text.len()]);
                html.push_escaped(Escaped::line(text));
                html.push("\n");
            }
        }
        turn_to(&mut html, ChangeTag::Equal);
        (html, is_whole)
    }
}

// The templates write it as it is.
impl std::fmt::Display for Html {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl askama::filters::HtmlSafe for Html {}

/// The beginning of a JSON text, on one line, and whether that is all of it.
pub(crate) fn beginning(json: &str) -> (Html, bool) {
    let mut text = String::new();
    for token in Tokens::of(json) {
        // One character more tells that there is more.
        text.extend(token.compact().chars().take(BEGINNING + 1));
        if text.len() > 4 * BEGINNING {
            break;
        }
    }
    let mut beginning: String = text.chars().take(BEGINNING).collect();
    let is_whole = beginning.len() == text.len();
    if !is_whole {
        beginning.push('…');
    }
    (Html::line(&beginning), is_whole)
}

/// Writes JSON without space between its parts.
pub(crate) fn compact(json: &str) -> String {
    Tokens::of(json).map(|token| token.compact()).collect()
}

/// Formats JSON for people to edit. Deceptive characters are JSON escapes, which mean the same.
/// `None` if a form of at most so many bytes could not hold it.
pub(crate) fn editable(json: &str, limit: usize) -> Option<String> {
    let lines = pretty(json, "  ");
    if lines.len() > limit {
        return None;
    }
    let mut text = String::with_capacity(lines.len());
    for (at, line) in lines.lines().enumerate() {
        if at > 0 {
            text.push('\n');
        }
        _ = write!(text, "{}", Escaped::json(line));
    }
    fits_form(&text, limit).then_some(text)
}

/// Whether a text takes at most so many bytes in a form as a browser sends it.
pub(crate) fn fits_form(text: &str, limit: usize) -> bool {
    let breaks = text.bytes().filter(|byte| *byte == b'\n').count();
    let sent = form_urlencoded::byte_serialize(text.as_bytes());
    // A browser sends a carriage return before each line feed, in three bytes.
    let len: usize = sent.map(str::len).sum();
    len + 3 * breaks <= limit
}

/// Formats JSON with a member or an element on each line, each indented by its depth.
fn pretty(json: &str, indent: &str) -> String {
    let mut text = String::new();
    for token in Tokens::of(json) {
        match token {
            Token::Break(depth) => {
                text.push('\n');
                text.extend(std::iter::repeat_n(indent, depth.min(DEEPEST)));
            }
            Token::Mark(part) | Token::Literal(part) => text.push_str(part),
            Token::Name(part) | Token::String(part) => text.push_str(&quoted(part)),
        }
    }
    text
}

/// Writes a JSON string with the fewest escapes: two texts with the same digest look the same.
fn quoted(json: &str) -> String {
    let text = serde_json::from_str::<String>(json);
    let text = text.and_then(|text| serde_json::to_string(&text));
    text.unwrap_or_else(|_| json.to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    /// A line break, and the depth of the next line.
    Break(usize),
    /// Punctuation.
    Mark(&'static str),
    /// The name of a member, as JSON.
    Name(&'a str),
    /// A string, as JSON.
    String(&'a str),
    /// A number, `true`, `false` or `null`.
    Literal(&'a str),
}

impl<'a> Token<'a> {
    fn compact(self) -> &'a str {
        match self {
            Self::Break(_) => "",
            Self::Mark(": ") => ":",
            Self::Mark(text) => text,
            Self::Name(text) | Self::String(text) | Self::Literal(text) => text,
        }
    }
}

/// Splits JSON text. Numbers stay as they were written: no parser rounds what a reviewer sees.
///
/// A text that is no JSON is split somehow, and no part of it is lost.
struct Tokens<'a> {
    rest: &'a str,
    depth: usize,
    next: Option<Token<'a>>,
}

impl<'a> Tokens<'a> {
    fn of(json: &'a str) -> Self {
        Self {
            rest: json,
            depth: 0,
            next: None,
        }
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken
    }

    /// The length of the string that the text begins with, quotes included.
    fn string_len(&self) -> usize {
        let mut is_escaped = false;
        for (at, byte) in self.rest.bytes().enumerate().skip(1) {
            match byte {
                _ if is_escaped => is_escaped = false,
                b'\\' => is_escaped = true,
                b'"' => return at + 1,
                _ => {}
            }
        }
        self.rest.len()
    }
}

const SPACE: [char; 4] = [' ', '\n', '\r', '\t'];

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        if let Some(token) = self.next.take() {
            return Some(token);
        }
        self.rest = self.rest.trim_start_matches(SPACE);
        let first = *self.rest.as_bytes().first()?;
        let token = match first {
            b'{' | b'[' => {
                self.take(1);
                self.rest = self.rest.trim_start_matches(SPACE);
                let is_object = first == b'{';
                if self.rest.starts_with(if is_object { '}' } else { ']' }) {
                    self.take(1);
                    Token::Mark(if is_object { "{}" } else { "[]" })
                } else {
                    self.depth += 1;
                    self.next = Some(Token::Break(self.depth));
                    Token::Mark(if is_object { "{" } else { "[" })
                }
            }
            b'}' | b']' => {
                self.take(1);
                self.depth = self.depth.saturating_sub(1);
                self.next = Some(Token::Mark(if first == b'}' { "}" } else { "]" }));
                Token::Break(self.depth)
            }
            b',' => {
                self.take(1);
                self.next = Some(Token::Break(self.depth));
                Token::Mark(",")
            }
            b':' => {
                self.take(1);
                Token::Mark(": ")
            }
            b'"' => {
                let string = self.take(self.string_len());
                if self.rest.trim_start_matches(SPACE).starts_with(':') {
                    Token::Name(string)
                } else {
                    Token::String(string)
                }
            }
            _ => {
                let end = self.rest.find(|character: char| {
                    SPACE.contains(&character) || "{}[],:\"".contains(character)
                });
                Token::Literal(self.take(end.unwrap_or(self.rest.len())))
            }
        };
        Some(token)
    }
}

/// How long ago something happened, in words.
pub(crate) fn age(at: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(at).map_or(0, |age| age.as_secs());
    format!("{} ago", span(seconds))
}

/// How far off something is, in words.
pub(crate) fn until(at: SystemTime, now: SystemTime) -> String {
    match at.duration_since(now) {
        Ok(left) => format!("in {}", span(left.as_secs())),
        Err(_) => "now".to_owned(),
    }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_others_wrote_is_markup() {
        let hostile = r#"{"<script>alert(1)</script>": "\"'><img src=x onerror=alert(1)>&amp;"}"#;
        for html in [
            Html::json(hostile),
            Html::line(hostile),
            Html::lines(hostile),
            Html::diff(hostile, "{}").0,
            beginning(hostile).0,
        ] {
            let html = html.to_string();
            assert!(
                !html.contains("<script") && !html.contains("<img"),
                "{html}"
            );
            assert!(html.contains("&lt;script&gt;"), "{html}");
        }
    }

    #[test]
    fn deceptive_characters_are_visible_wherever_they_stand() {
        let text = "a\u{202e}b";
        let json = format!(r#"{{"{text}": "{text}"}}"#);
        let shown = "a<mark>\\u{202E}</mark>b";
        for (html, times) in [
            (Html::line(text), 1),
            (Html::lines(text), 1),
            (Html::json(&json), 2),
            (Html::json(r#"{"x": "a\u202eb"}"#), 1),
            (Html::diff(&json, "{}").0, 2),
        ] {
            let html = html.to_string();
            assert_eq!(html.matches(shown).count(), times, "{html}");
            assert!(!html.contains('\u{202e}'));
        }
    }

    #[test]
    fn json_is_shown_as_it_was_written_a_member_on_each_line() {
        let json =
            r#" {"b":[1.0,-0,12345678901234567890123,true ,{}],"a" : "x\ty\u00e9", "c":[ ] } "#;
        assert_eq!(
            pretty(json, "  "),
            "{\n  \"b\": [\n    1.0,\n    -0,\n    12345678901234567890123,\n    true,\n    {}\n  ],\n  \
             \"a\": \"x\\ty\u{e9}\",\n  \"c\": []\n}"
        );
        for scalar in ["\"a\"", "1e9", "null"] {
            assert_eq!(pretty(scalar, "  "), scalar);
        }
        assert_eq!(
            compact(json),
            r#"{"b":[1.0,-0,12345678901234567890123,true,{}],"a":"x\ty\u00e9","c":[]}"#
        );
        let (shown, is_whole) = beginning(" [ 1, 2 ] ");
        assert_eq!((shown.to_string().as_str(), is_whole), ("[1,2]", true));
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        let again: serde_json::Value = serde_json::from_str(&pretty(json, "\t")).unwrap();
        assert_eq!(value, again);
    }

    #[test]
    fn what_is_edited_has_no_deceptive_characters_and_means_the_same() {
        let json = "{\"a\u{202e}\":[\"b\u{200b}\\n\",\"\u{e9}\"]}";
        let text = editable(json, 1000).unwrap();
        assert_eq!(
            text,
            "{\n  \"a\\u202e\": [\n    \"b\\u200b\\n\",\n    \"\u{e9}\"\n  ]\n}"
        );
        let [one, other] =
            [json, &text].map(|json| serde_json::from_str::<serde_json::Value>(json).unwrap());
        assert_eq!(one, other);
    }

    /// Payloads of 200 KB that take the most markup, or the most space.
    fn heavy() -> Vec<String> {
        let array = |element: &str, depth: usize| {
            let elements = vec![element; 200_000 / (element.len() + 1)].join(",");
            format!("{}{elements}{}", "[".repeat(depth), "]".repeat(depth))
        };
        vec![
            array("1", 1),
            array("1", 100),
            array("\"\"", 100),
            array("1,\"\"", 100),
            array("[]", 100),
            array("[1]", 100),
            array("{\"\":1}", 100),
            array("\"\u{7f}\"", 100),
            array(&format!("\"{}\"", "\u{7f}".repeat(190_000)), 1),
            array(&format!("\"{}\"", "\u{7f}a".repeat(95_000)), 1),
            array(&format!("\"{}\"", "\\\"'".repeat(60_000)), 1),
        ]
    }

    #[test]
    fn a_small_payload_does_not_make_a_huge_page() {
        for json in heavy() {
            let html = Html::json(&json).to_string();
            assert!(
                html.len() < 13 * json.len(),
                "{} {}",
                html.len(),
                &json[..120]
            );
            let (changes, _) = Html::diff(&json, &json.replace(['1', '\u{7f}'], "2"));
            let len = changes.to_string().len();
            assert!(
                len < LONGEST_DIFF + 11 * json.len(),
                "{len} {}",
                &json[..120]
            );
        }
    }

    /// What a browser shows of HTML without blocks.
    fn shown(html: &Html) -> String {
        let html = html.to_string();
        let mut text = String::new();
        for part in html.split('<') {
            text.push_str(part.split_once('>').map_or(part, |(_, text)| text));
        }
        text.replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&amp;", "&")
    }

    #[test]
    fn nothing_of_a_payload_is_lost_in_its_markup() {
        let json =
            r#"{"<b>":[1,2.50,null,[3,"&amp;",{}],-1e9,"x",true],"":{"a\"b":false,"c":[[]]}}"#;
        assert_eq!(shown(&Html::json(json)), pretty(json, "\t"));
        let elements = Html::json("[1,2,[3,4],{},5]").to_string();
        assert_eq!(
            elements,
            "[\n\t<b>1,\n\t2</b>,\n\t[\n\t\t<b>3,\n\t\t4</b>\n\t],\n\t{},\n\t<b>5</b>\n]"
        );
        for json in heavy().iter().filter(|json| json.contains('1')) {
            assert_eq!(shown(&Html::json(json)), pretty(json, "\t"));
        }
        let marks = Html::line("a\u{200b}\u{200b}b\u{7f}").to_string();
        assert_eq!(
            marks,
            "a<mark>\\u{200B}\\u{200B}</mark>b<mark>\\u{7F}</mark>"
        );
    }

    #[test]
    fn a_payload_that_no_form_holds_is_not_edited() {
        let json = format!("[{}1]", "1,".repeat(1000));
        let text = editable(&json, 100_000).unwrap();
        assert!(fits_form(&text, 100_000));
        assert_eq!(editable(&json, text.len()), None);
        assert_eq!(editable(&json, text.len() - 1), None);
    }

    #[test]
    fn a_text_that_is_no_json_is_shown_whole() {
        for text in ["", "\"open", "{", "]]", "{\"a\"", "\"a\\", "nul: l", "é"] {
            let shown: String = pretty(text, "  ").split_whitespace().collect();
            let whole: String = text.split_whitespace().collect();
            assert_eq!(shown, whole);
            Html::json(text);
        }
    }

    #[test]
    fn long_texts_are_folded_and_whole() {
        let long = "word ".repeat(40_000);
        let html = Html::json(&format!("{{\"text\": \"{long}\"}}")).to_string();
        assert!(html.contains("<details") && html.contains("200000 characters, 1 line<"));
        assert!(html.contains(&long));
        let short = Html::json(r#"{"text": "two\nlines"}"#).to_string();
        assert!(!short.contains("<details") && short.contains("two\nlines"));
    }

    #[test]
    fn a_diff_shows_what_was_taken_and_what_was_added() {
        let (html, is_whole) = Html::diff(r#"{"to":"a","amount":1}"#, r#"{"to":"a","amount":2}"#);
        assert_eq!(
            html.to_string(),
            "  {\n  \t\"to\": \"a\",\n<del>- \t\"amount\": 1\n</del><ins>+ \t\"amount\": 2\n</ins>  }\n"
        );
        assert!(is_whole);
        assert_eq!(Html::diff("{}", "{ }"), (Html::default(), true));
    }

    #[test]
    fn a_diff_says_when_there_is_more_of_it() {
        let [old, new] = ["1", "2"].map(|element| format!("[{}]", vec![element; 90_000].join(",")));
        let (html, is_whole) = Html::diff(&old, &new);
        assert!(!is_whole);
        let html = html.to_string();
        assert!(html.len() < LONGEST_DIFF + 100 && html.ends_with("</del>"));
    }

    /// A value of an attribute would end at a quote.
    #[test]
    fn no_page_has_this_html_in_an_attribute() {
        let sources = [
            include_str!("action.rs"),
            include_str!("decide.rs"),
            include_str!("list.rs"),
            include_str!("page.rs"),
            include_str!("sign_in.rs"),
        ];
        let fields: Vec<&str> = sources
            .iter()
            .flat_map(|source| source.lines())
            .filter_map(|line| line.trim().trim_end_matches(',').split_once(": "))
            .filter(|(_, of)| ["Html", "Option<Html>", "Option<Diff>"].contains(of))
            .map(|(name, _)| name.rsplit(' ').next().unwrap_or(name))
            .collect();
        assert!(fields.contains(&"payload") && fields.contains(&"title"));
        let pages = [
            include_str!("pages/action.html"),
            include_str!("pages/again.html"),
            include_str!("pages/base.html"),
            include_str!("pages/decided.html"),
            include_str!("pages/error.html"),
            include_str!("pages/list.html"),
            include_str!("pages/sign_in.html"),
            include_str!("pages/tenants.html"),
        ];
        let mut values = 0;
        for tag in pages.iter().flat_map(|page| page.split('<').skip(1)) {
            let tag = tag.split_once('>').map_or(tag, |(tag, _)| tag);
            for value in tag.split("{{ ").skip(1) {
                let value = value.split_once(" }}").map_or(value, |(value, _)| value);
                let name = value.rsplit('.').next().unwrap_or(value);
                assert!(!fields.contains(&name), "{value}");
                values += 1;
            }
        }
        assert!(values > 20, "{values}");
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let at = SystemTime::UNIX_EPOCH;
        for (seconds, shown) in [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (7_199, "1 h"),
            (200_000, "2 days"),
        ] {
            let later = at + Duration::from_secs(seconds);
            assert_eq!(age(at, later), format!("{shown} ago"));
            assert_eq!(until(later, at), format!("in {shown}"));
        }
        assert_eq!(age(at + Duration::from_secs(5), at), "0 s ago");
        assert_eq!(until(at, at + Duration::from_secs(5)), "now");
    }
}
