//! What a hostile peer, proxy, setting or stack can make the client side do, against what it promises.

mod answers;
mod bodies;
mod http2;
mod proxies;
mod secrets;
mod settings;
mod times;
mod tls;

use std::error::Error as StdError;
use std::time::Duration;

use aegis_hitl::client::Builder;
use aegis_hitl::{Error, Receipt};

use crate::support::{ends, service};

/// A service whose attempts end soon.
fn builder(url: &str) -> Builder {
    service::builder(url).timeout(Duration::from_secs(2))
}

/// All that an error and its sources say, in both forms.
fn said(error: &(dyn StdError + 'static)) -> String {
    let mut said = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        said.push_str(&format!("{error} {error:?} {error:#?}\n"));
        next = error.source();
    }
    said
}

async fn approve(url: &str) -> Result<Receipt, Error> {
    ends(builder(url).build().unwrap().approve("k-1").into_future()).await
}
