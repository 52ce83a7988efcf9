//! The copy of a request that is kept for another attempt.

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use smallvec::SmallVec;

use super::Replay;

/// How many headers a kept request holds without an allocation.
const INLINE_HEADERS: usize = 8;

/// A request, kept so that it can be sent again byte for byte.
///
/// Names and values are reference counts or small copies, so that keeping up to eight headers allocates nothing; cloning a
/// `HeaderMap` would allocate twice.
#[derive(Debug)]
pub(super) struct Kept<B> {
    method: Method,
    uri: Uri,
    version: Version,
    headers: SmallVec<[(HeaderName, HeaderValue); INLINE_HEADERS]>,
    extensions: Extensions,
    body: B,
}

impl<B: Replay> Kept<B> {
    pub(super) fn of(request: &Request<B>) -> Option<Self> {
        Some(Self {
            body: request.body().replay()?,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            extensions: request.extensions().clone(),
        })
    }

    /// Returns the request once more, or `None` if its body cannot be sent again.
    pub(super) fn request(&self) -> Option<Request<B>> {
        let mut request = Request::new(self.body.replay()?);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.extensions_mut() = self.extensions.clone();
        // As many headers as one map held before fit a map again: neither call fails.
        let mut headers = HeaderMap::try_with_capacity(self.headers.len()).unwrap_or_default();
        for (name, value) in &self.headers {
            let _ = headers.try_append(name, value.clone());
        }
        *request.headers_mut() = headers;
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_request_is_sent_again_as_it_was() {
        for headers in [0, 3, 8, 20] {
            let mut request = Request::put("http://host/path?q=1").version(Version::HTTP_2);
            for i in 0..headers {
                request = request.header(format!("x-{}", i % 5), i.to_string());
            }
            let request = request.extension(7_u8).body("body").unwrap();
            let again = Kept::of(&request).unwrap().request().unwrap();
            assert_eq!(again.method(), request.method());
            assert_eq!(again.uri(), request.uri());
            assert_eq!(again.version(), request.version());
            assert_eq!(again.headers(), request.headers());
            let order = |request: &Request<&str>| -> Vec<_> {
                request
                    .headers()
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect()
            };
            assert_eq!(order(&again), order(&request));
            assert_eq!(again.extensions().get::<u8>(), Some(&7));
            assert_eq!(again.body(), request.body());
        }
    }
}
