//! The parts of a JSON text.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token<'a> {
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
    pub(super) fn compact(self) -> &'a str {
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
pub(super) struct Tokens<'a> {
    rest: &'a str,
    depth: usize,
    next: Option<Token<'a>>,
}

impl<'a> Tokens<'a> {
    pub(super) fn of(json: &'a str) -> Self {
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
