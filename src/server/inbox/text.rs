//! What others wrote, as HTML: escaped, with deceptive characters visible and long texts folded.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use similar::{ChangeTag, TextDiff};

use super::tokens::{Token, Tokens};
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
mod tests;
