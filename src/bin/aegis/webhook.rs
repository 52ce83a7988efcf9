//! The `[[webhook]]` tables of the configuration file.

use std::path::Path;

use aegis_hitl::outbox::{Endpoint, Secret, Start};
use aegis_hitl::protocol::Escaped;
use aegis_hitl::protocol::EventKind;

use crate::config::{Begin, Format, Secrets, Webhook};
use crate::failure::Failure;
use crate::file;

/// The most bytes of a file of secrets.
const MAX_BYTES: u64 = 64 * 1024;

/// The most bytes of a file of roots, which may be a platform's whole bundle.
const MAX_CA_BYTES: u64 = 4 * 1024 * 1024;

/// Makes the endpoints. Errors name the endpoint, and repeat neither URL nor secret.
pub(crate) fn endpoints(webhooks: Vec<Webhook>) -> Result<Vec<Endpoint>, Failure> {
    webhooks.into_iter().map(endpoint).collect()
}

fn endpoint(webhook: Webhook) -> Result<Endpoint, Failure> {
    let name = webhook.name.as_str();
    let wrong = || Failure::usage(format!("webhook '{}'", Escaped::line(name)));
    let fault = |fault: &str| Failure::usage(format!("{}: {fault}", wrong().message()));
    let has_secret = webhook.secret.is_some() || webhook.secret_file.is_some();
    let url = &webhook.url;
    let made = match webhook.format {
        Format::Standard => {
            let secrets = match (webhook.secret, &webhook.secret_file) {
                (Some(_), Some(_)) => {
                    return Err(fault("both secret and secret-file are set; allowed is one"));
                }
                (Some(Secrets::One(secret)), None) => vec![secret],
                (Some(Secrets::Several(secrets)), None) => secrets,
                (None, Some(file)) => read(file).map_err(|failure| fault(failure.message()))?,
                (None, None) => Vec::new(),
            };
            let secrets = secrets.iter().map(|secret| secret.parse());
            let secrets: Result<Vec<Secret>, _> = secrets.collect();
            Endpoint::standard(name, url, secrets.map_err(|error| wrong().because(error))?)
        }
        Format::Slack | Format::Ntfy if has_secret => {
            return Err(fault(
                "has a secret, and messages in its format are not signed",
            ));
        }
        Format::Slack => Endpoint::slack(name, url),
        Format::Ntfy => Endpoint::ntfy(name, url),
    };
    let mut endpoint = made.map_err(|error| wrong().because(error))?;
    // It would be there and deliver nothing.
    for (list, name) in [(&webhook.tenants, "tenants"), (&webhook.events, "events")] {
        if list.as_ref().is_some_and(Vec::is_empty) {
            return Err(fault(&format!(
                "{name} is empty, so nothing would be delivered; leave it out for all"
            )));
        }
    }
    if let Some(tenants) = webhook.tenants {
        let tenants = tenants.iter().map(|tenant| tenant.parse());
        let tenants: Result<Vec<_>, _> = tenants.collect();
        endpoint = endpoint.tenants(tenants.map_err(|error| wrong().because(error))?);
    }
    if let Some(events) = webhook.events {
        let events = events.iter().map(|event| event.parse());
        let events: Result<Vec<EventKind>, _> = events.collect();
        endpoint = endpoint.events(events.map_err(|error| wrong().because(error))?);
    }
    if let Some(path) = &webhook.ca {
        let pem = file::open(path, "one with certificates as PEM")
            .and_then(|file| file::read(path, &file, MAX_CA_BYTES))
            .map_err(|failure| fault(&format!("ca: {}", failure.message())))?;
        endpoint = endpoint.root_certificates_pem(&pem).map_err(|error| {
            Failure::usage(format!("{}: ca: {}", wrong().message(), path.display())).because(error)
        })?;
    }
    Ok(endpoint.start(match webhook.from {
        Begin::Now => Start::Now,
        Begin::Oldest => Start::Oldest,
    }))
}

/// Reads a file of secrets, one to a line. The first one is the newest.
fn read(path: &Path) -> Result<Vec<String>, Failure> {
    let unreadable =
        |error| Failure::usage(format!("cannot read {}", path.display())).because(error);
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(Failure::usage(format!(
            "{} is no regular file of at most {MAX_BYTES} bytes",
            path.display()
        )));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;

        let mode = metadata.mode() & 0o7777;
        if mode & 0o066 != 0 {
            tracing::warn!(
                target: crate::LOG,
                "{} can be read or written by others (mode {mode:04o}); it holds a secret",
                path.display()
            );
        }
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let lines = text.lines().map(str::trim);
    Ok(lines
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect())
}
