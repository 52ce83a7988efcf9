//! Server-sent events, as the WHATWG's HTML standard has them (section 9.2).

/// The most bytes that one event may have, and a line of one.
const MAX_EVENT: usize = 1024 * 1024;

/// An event as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    /// The word after `event:`; empty if there was none.
    pub(super) name: String,
    pub(super) data: String,
    /// The last id that was sent, with this event or before it.
    pub(super) id: String,
}

/// An event has more bytes than are read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// Parses a stream piece by piece.
#[derive(Debug, Default)]
pub(super) struct Parser {
    line: Vec<u8>,
    name: String,
    data: String,
    has_data: bool,
    id: String,
    /// Whether the last byte was a CR. An LF after it belongs to it.
    after_cr: bool,
    /// Whether the first line is behind.
    has_begun: bool,
}

impl Parser {
    /// Reads a piece, and adds the events that end in it.
    ///
    /// An event that the stream ends in is not one.
    pub(super) fn push(
        &mut self,
        piece: &[u8],
        mut found: impl FnMut(Message),
    ) -> Result<(), TooLong> {
        for &byte in piece {
            let is_rest_of_break = byte == b'\n' && self.after_cr;
            self.after_cr = byte == b'\r';
            match byte {
                _ if is_rest_of_break => {}
                b'\r' | b'\n' => found_in(self.end_line(), &mut found),
                _ if self.line.len() + self.data.len() >= MAX_EVENT => return Err(TooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(())
    }

    /// Returns the last id that was sent, with or without an event. Empty if there was none.
    pub(super) fn last_id(&self) -> &str {
        &self.id
    }

    fn end_line(&mut self) -> Option<Message> {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line);
        let text = match self.has_begun {
            true => &*text,
            false => text.strip_prefix('\u{feff}').unwrap_or(&text),
        };
        self.has_begun = true;
        if text.is_empty() {
            return self.end_event();
        }
        let (field, value) = text.split_once(':').unwrap_or((text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" => {
                if self.has_data {
                    self.data.push('\n');
                }
                self.has_data = true;
                self.data.push_str(value);
            }
            "id" if !value.contains('\0') => value.clone_into(&mut self.id),
            // A comment, the time to wait before a reconnect, or a field of the future.
            _ => {}
        }
        None
    }

    fn end_event(&mut self) -> Option<Message> {
        let name = std::mem::take(&mut self.name);
        let data = std::mem::take(&mut self.data);
        std::mem::take(&mut self.has_data).then(|| Message {
            name,
            data,
            id: self.id.clone(),
        })
    }
}

fn found_in(message: Option<Message>, found: &mut impl FnMut(Message)) {
    if let Some(message) = message {
        found(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(pieces: &[&[u8]]) -> Result<Vec<Message>, TooLong> {
        let mut parser = Parser::default();
        let mut messages = Vec::new();
        for piece in pieces {
            parser.push(piece, |message| messages.push(message))?;
        }
        Ok(messages)
    }

    fn message(id: &str, name: &str, data: &str) -> Message {
        Message {
            id: id.to_owned(),
            name: name.to_owned(),
            data: data.to_owned(),
        }
    }

    #[test]
    fn a_stream_is_read_as_the_standard_has_it() {
        let cases: [(&[u8], &[Message]); 13] = [
            (b"", &[]),
            (b":\n\n: comment\n\n", &[]),
            (b"data: a\n\n", &[message("", "", "a")]),
            (
                b"data:a\ndata: b\ndata:  c\n\n",
                &[message("", "", "a\nb\n c")],
            ),
            (
                b"id: 1\nevent: x\ndata: a\n\ndata: b\n\n",
                &[message("1", "x", "a"), message("1", "", "b")],
            ),
            (b"\xef\xbb\xbfdata: a\n\n", &[message("", "", "a")]),
            (b"data: \xef\xbb\xbf\n\n", &[message("", "", "\u{feff}")]),
            (
                b"data\n\ndata\ndata\n\n",
                &[message("", "", ""), message("", "", "\n")],
            ),
            (b"id: 1\0\ndata: a\n\n", &[message("", "", "a")]),
            (b"id: 1\n\nid\ndata: a\n\n", &[message("", "", "a")]),
            (b"event: x\n\ndata: a\n\n", &[message("", "", "a")]),
            (b"data: cut off\n", &[]),
            (
                b"retry: 9\nfuture: 1\ndata: \xff\n\n",
                &[message("", "", "\u{fffd}")],
            ),
        ];
        for (text, messages) in cases {
            let shown = String::from_utf8_lossy(text);
            assert_eq!(parsed(&[text]).unwrap(), messages, "{shown:?}");
            // The same in pieces of a byte, and with the other ends of lines.
            let pieces: Vec<&[u8]> = text.chunks(1).collect();
            assert_eq!(parsed(&pieces).unwrap(), messages, "{shown:?}");
            for end in [&b"\r"[..], b"\r\n"] {
                let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
                let text = lines.join(end);
                assert_eq!(parsed(&[&text]).unwrap(), messages, "{shown:?}");
                let pieces: Vec<&[u8]> = text.chunks(1).collect();
                assert_eq!(parsed(&pieces).unwrap(), messages, "{shown:?}");
            }
        }
    }

    #[test]
    fn an_id_without_an_event_is_kept() {
        let mut parser = Parser::default();
        parser.push(b"id: 7\n\n", |_| panic!("no event")).unwrap();
        assert_eq!(parser.last_id(), "7");
    }

    #[test]
    fn an_event_may_have_nearly_1_mib() {
        let data = "x".repeat(1_048_000);
        let stream = format!("data: {data}\n\n");
        assert_eq!(
            parsed(&[stream.as_bytes()]),
            Ok(vec![message("", "", &data)])
        );
    }

    #[test]
    fn an_event_without_an_end_is_refused() {
        let line = vec![b'a'; MAX_EVENT + 1];
        assert_eq!(parsed(&[b"data: ", &line]), Err(TooLong));
        let lines = b"data: 12345678\n".repeat(MAX_EVENT / 8 + 1);
        assert_eq!(parsed(&[&lines]), Err(TooLong));
        // Comments add up to nothing.
        let comments = b": 12345678\n".repeat(MAX_EVENT / 8 + 1);
        assert_eq!(parsed(&[&comments]), Ok(Vec::new()));
    }
}
