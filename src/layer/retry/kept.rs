//! The copy of a request that is kept for another attempt.

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use smallvec::SmallVec;

use super::Replay;

/// How many headers are kept without allocating.
const INLINE_HEADERS: usize = 6;

/// The headers of a request as it arrived.
///
/// Names and values are reference counts or small copies, so keeping up to six headers allocates
/// nothing. Cloning a `HeaderMap` would allocate twice.
#[derive(Debug, Default)]
pub(super) struct KeptHeaders(SmallVec<[(HeaderName, HeaderValue); INLINE_HEADERS]>);

impl KeptHeaders {
    pub(super) fn reserve(&mut self, headers: &HeaderMap) {
        self.0.reserve(headers.len());
    }

    #[inline]
    pub(super) fn keep(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.0.push((name.clone(), value.clone()));
    }

    /// Returns a copy of the headers.
    fn map(&self) -> HeaderMap {
        // A map held as many headers before, so neither call fails.
        let mut map = HeaderMap::try_with_capacity(self.0.len()).unwrap_or_default();
        for (name, value) in &self.0 {
            let _ = map.try_append(name, value.clone());
        }
        map
    }
}

/// A copy of a request, to send it again byte for byte with its headers.
#[derive(Debug)]
pub(super) struct Kept<B> {
    method: Method,
    uri: Uri,
    version: Version,
    extensions: Extensions,
    /// `None` if it cannot be sent again, or will not be.
    body: Option<B>,
}

impl<B> Kept<B> {
    pub(super) fn method(&self) -> &Method {
        &self.method
    }

    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }

    pub(super) fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// Whether the request can be sent again.
    pub(super) fn is_replayable(&self) -> bool {
        self.body.is_some()
    }

    /// Returns a copy of the request, around a body made by [`body`](Self::body).
    pub(super) fn request<T>(&self, headers: &KeptHeaders, body: T) -> Request<T> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.version_mut() = self.version;
        *request.extensions_mut() = self.extensions.clone();
        *request.headers_mut() = headers.map();
        request
    }
}

impl<B: Replay> Kept<B> {
    /// Keeps everything but the headers, which are kept as they are looked at. The body is kept
    /// only if it is `wanted`.
    #[inline(always)]
    pub(super) fn of(request: &Request<B>, wanted: bool) -> Self {
        Self {
            body: if wanted {
                request.body().replay()
            } else {
                None
            },
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            extensions: request.extensions().clone(),
        }
    }

    /// Returns a copy of the body, or `None` if it cannot be sent again.
    pub(super) fn body(&self) -> Option<B> {
        self.body.as_ref()?.replay()
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
            let mut headers = KeptHeaders::default();
            for (name, value) in request.headers() {
                headers.keep(name, value);
            }
            let kept = Kept::of(&request, true);
            let again = kept.request(&headers, kept.body().unwrap());
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
