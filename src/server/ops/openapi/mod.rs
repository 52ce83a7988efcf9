//! `GET /openapi.json` and `GET /docs`: the description of the API, for programs and for people.
//!
//! Both are written from one table of endpoints. The statuses of problems and the limits are those
//! of the code that answers.

mod document;
mod endpoints;
mod page;
mod schemas;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderValue, Method};

use crate::protocol::Prefix;
use crate::server::http::{Rejection, Response, ResponseBody};

/// What a description is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Document,
    Page,
}

impl Form {
    /// The form at a path, if there is one.
    pub(crate) fn of(path: &str) -> Option<Self> {
        match path {
            "/openapi.json" | "/openapi.json/" => Some(Self::Document),
            "/docs" | "/docs/" => Some(Self::Page),
            _ => None,
        }
    }

    /// The name in the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Document => "openapi",
            Self::Page => "docs",
        }
    }
}

/// The description of a service. Each form is written when it is first requested.
#[derive(Debug)]
pub(crate) struct Reference {
    prefix: Prefix,
    has_keys: bool,
    document: OnceLock<Bytes>,
    page: OnceLock<Bytes>,
}

impl Reference {
    pub(crate) fn new(prefix: Prefix, has_keys: bool) -> Self {
        Self {
            prefix,
            has_keys,
            document: OnceLock::new(),
            page: OnceLock::new(),
        }
    }

    pub(crate) fn respond(&self, form: Form, method: &Method) -> Result<Response, Rejection> {
        if *method != Method::GET && *method != Method::HEAD {
            return Err(Rejection::method("GET, HEAD"));
        }
        let Self {
            prefix, has_keys, ..
        } = self;
        let (media_type, text) = match form {
            Form::Document => {
                let write = || document::text(prefix.as_str(), *has_keys).into();
                ("application/json", self.document.get_or_init(write))
            }
            Form::Page => {
                let write = || page::html(prefix.as_str(), *has_keys).into();
                ("text/html; charset=utf-8", self.page.get_or_init(write))
            }
        };
        let mut response = Response::new(ResponseBody::whole(text.clone()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if form == Form::Page {
            page::protect(headers);
        }
        Ok(response)
    }
}
