//! An error and its sources.

use std::error::Error;
use std::fmt;

/// Displays an error and its sources, outermost first, separated by colons.
///
/// Parts of the text may come from another program. Wrap it in [`Escaped`](super::Escaped) where
/// people read it.
///
/// ```
/// use std::io;
/// use aegis_hitl::protocol::ErrorChain;
///
/// let error = io::Error::other(io::Error::other("no route"));
/// assert_eq!(ErrorChain(&error).to_string(), "no route");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct ErrorChain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Level(&'static str, Option<Box<Level>>);

    impl fmt::Display for Level {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Level {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|error| error as &dyn Error)
        }
    }

    #[test]
    fn the_sources_follow_the_error_in_their_order() {
        let inner = Level("c", None);
        let middle = Level("b", Some(Box::new(inner)));
        let error = Level("a", Some(Box::new(middle)));
        assert_eq!(ErrorChain(&error).to_string(), "a: b: c");
        assert_eq!(ErrorChain(&Level("a", None)).to_string(), "a");
    }
}
