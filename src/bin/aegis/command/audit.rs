//! `aegis audit`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Read, Write};
use std::path::PathBuf;

use aegis_hitl::TenantId;
use aegis_hitl::protocol::{Digest, Escaped};
use aegis_hitl::store::{AuditHead, AuditVerifier, VerifiedChain};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Context;
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json};
use crate::trail::Trail;

/// The most lines of an export that are read from the database at once.
const PAGE: usize = 1024;

/// The longest line that is verified, in bytes. The names and texts of an event are far shorter.
const MAX_LINE: u64 = 1024 * 1024;

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Writes the events of a tenant, or of each, as lines of JSON that are verified by themselves.
    Export(Export),
    /// Says whether an export, or the database, has every event as it was chained (exit code 0) or
    /// not (1).
    Verify(Verify),
    /// Shows the hash of the newest chained event of a tenant, or of each, to be noted elsewhere.
    Head(Head),
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database: a file, or postgres://user@host:5432/database [default: aegis.db]. Servers may
    /// use it.
    #[arg(
        long,
        env = "AEGIS_STORE",
        value_name = "FILE|URL",
        hide_env_values = true
    )]
    pub(crate) store: Option<PathBuf>,

    /// The tenant [default: all, one after another]. What is verified must have it.
    #[arg(long, env = "AEGIS_TENANT", value_name = "TENANT")]
    pub(crate) tenant: Option<TenantId>,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Begins with the event of this number in its tenant's chain; the first has number 1.
    #[arg(
        long,
        value_name = "SEQ",
        default_value = "1",
        value_parser = clap::value_parser!(u64).range(1..),
        requires = "tenant"
    )]
    pub(crate) from: u64,

    #[command(flatten)]
    pub(crate) options: Options,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// An export, or - for standard input. Without one, the database is verified.
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,

    /// A hash that was noted earlier, which a chain must have; repeatable.
    #[arg(long, value_name = "HASH", value_parser = hash)]
    pub(crate) head: Vec<Digest>,

    #[command(flatten)]
    pub(crate) options: Options,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Head {
    #[command(flatten)]
    pub(crate) options: Options,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

fn hash(text: &str) -> Result<Digest, String> {
    text.parse()
        .map_err(|_| "allowed are 64 hexadecimal digits; see 'aegis audit head'".to_owned())
}

pub(crate) async fn run(command: Audit, context: Context) -> Result<(), Failure> {
    match command {
        Audit::Export(args) => export(&args, context).await,
        Audit::Verify(args) => verify(args, context).await,
        Audit::Head(args) => head(&args, context).await,
    }
}

impl Options {
    async fn open(&self, context: Context) -> Result<Trail, Failure> {
        let store = self.store.clone().or(context.config.serve.store);
        Trail::open(store.unwrap_or_else(|| PathBuf::from(config::STORE))).await
    }

    async fn tenants(&self, trail: &Trail) -> Result<Vec<String>, Failure> {
        match &self.tenant {
            Some(tenant) => Ok(vec![tenant.as_str().to_owned()]),
            None => trail.tenants().await,
        }
    }
}

async fn export(args: &Export, context: Context) -> Result<(), Failure> {
    let trail = args.options.open(context).await?;
    let tenants = args.options.tenants(&trail).await?;
    let mut output = Output::new();
    for tenant in tenants {
        // What is chained from now on is left out, so that there is an end.
        let head = trail.head(&tenant).await?;
        let mut after = args.from - 1;
        let Some(first) = trail.first_line(&tenant, after).await? else {
            return Err(Failure::usage(format!(
                "there is no event {} to begin with; the last one that is chained has number {}",
                args.from, head.seq
            )));
        };
        output.line(&first)?;
        while let Some(page) = trail.page(&tenant, after, head.seq, PAGE).await? {
            for line in &page.lines {
                output.line(line)?;
            }
            after = page.seq;
        }
        output.line(&head.line())?;
    }
    output.end()
}

/// Standard output. On a terminal, what would move, hide or forge text is written as escapes of
/// JSON.
struct Output {
    out: BufWriter<io::StdoutLock<'static>>,
    is_terminal: bool,
}

impl Output {
    fn new() -> Self {
        let out = io::stdout().lock();
        Self {
            is_terminal: out.is_terminal(),
            out: BufWriter::with_capacity(64 * 1024, out),
        }
    }

    fn line(&mut self, line: &str) -> Result<(), Failure> {
        match self.is_terminal {
            true => writeln!(self.out, "{}", Escaped::json(line)),
            false => writeln!(self.out, "{line}"),
        }
        .map_err(unwritten)
    }

    fn end(mut self) -> Result<(), Failure> {
        self.out.flush().map_err(unwritten)
    }
}

fn unwritten(error: io::Error) -> Failure {
    Failure::other("cannot write the export").because(error)
}

async fn verify(args: Verify, context: Context) -> Result<(), Failure> {
    match &args.file {
        Some(file) if file.as_os_str() == "-" => verify_export(&args, io::stdin().lock()),
        Some(file) => {
            let opened = File::open(file).map_err(|error| {
                Failure::other(format!("{} was not verified", file.display())).because(error)
            })?;
            verify_export(&args, BufReader::new(opened))
        }
        None => verify_store(&args, context).await,
    }
}

fn verify_export(args: &Verify, mut export: impl BufRead) -> Result<(), Failure> {
    let unread = |error: io::Error| Failure::other("the export cannot be read").because(error);
    let mut verifier = AuditVerifier::new();
    for head in &args.head {
        verifier = verifier.noted(*head.as_bytes());
    }
    let mut line = Vec::new();
    let mut lines = 0_u64;
    let verified = loop {
        line.clear();
        let mut limited = (&mut export).take(MAX_LINE);
        if limited.read_until(b'\n', &mut line).map_err(unread)? == 0 {
            break verifier.finish().map_err(|fault| fault.to_string());
        }
        lines += 1;
        let Some(text) = line.strip_suffix(b"\n") else {
            break Err(format!(
                "line {lines}: it has no line feed at its end, or more than {MAX_LINE} bytes"
            ));
        };
        if let Err(fault) = verifier.line(text) {
            break Err(fault.to_string());
        }
    };
    let verified = verified.and_then(|chains| match &args.options.tenant {
        Some(tenant)
            if chains
                .iter()
                .all(|chain| chain.head.tenant_id != tenant.as_str()) =>
        {
            Err(format!("the export has no chain of tenant {tenant}"))
        }
        _ => Ok(chains),
    });
    match verified {
        Ok(chains) if args.json => {
            let chains: Vec<_> = chains.iter().map(chain_json).collect();
            print_json(&json!({ "sound": true, "chains": chains }))
        }
        Ok(chains) => print(&chains.iter().map(chain_text).collect::<String>()),
        Err(fault) => unsound("the export", &[fault], args.json),
    }
}

async fn verify_store(args: &Verify, context: Context) -> Result<(), Failure> {
    let trail = args.options.open(context).await?;
    let tenant = args.options.tenant.as_ref().map(TenantId::as_str);
    let mut report = trail.verify(tenant).await?;
    for head in &args.head {
        if !trail.has_hash(tenant, head.as_bytes()).await? {
            report.faults.push(format!(
                "no chain has the head {head} that was noted: it was cut off or written anew"
            ));
        }
    }
    if !report.faults.is_empty() {
        return unsound("the audit trail", &report.faults, args.json);
    }
    // A name that is misspelled must not look verified.
    if let Some(tenant) = tenant
        && report
            .heads
            .iter()
            .all(|head| head.seq + head.unchained == 0)
    {
        return Err(Failure::other(format!(
            "nothing was verified: tenant {tenant} has no events"
        )));
    }
    if args.json {
        let chains: Vec<_> = report.heads.iter().map(head_json).collect();
        return print_json(&json!({
            "sound": true,
            "chains": chains,
            "removed": report.removed,
        }));
    }
    let mut text: String = report.heads.iter().map(head_text).collect();
    if report.removed > 0 {
        text.push_str(&format!("removed events: {}\n", report.removed));
    }
    print(&text)
}

fn unsound(what: &str, faults: &[String], json: bool) -> Result<(), Failure> {
    if json {
        print_json(&json!({ "sound": false, "faults": faults }))?;
    } else {
        print(&(faults.join("\n") + "\n"))?;
    }
    Err(Failure::other(format!("{what} is not sound")))
}

async fn head(args: &Head, context: Context) -> Result<(), Failure> {
    let trail = args.options.open(context).await?;
    let tenants = args.options.tenants(&trail).await?;
    let mut heads = Vec::with_capacity(tenants.len());
    for tenant in &tenants {
        heads.push(trail.head(tenant).await?);
    }
    if args.json {
        let heads: Vec<_> = heads.iter().map(head_json).collect();
        return print_json(&json!({ "chains": heads }));
    }
    print(&heads.iter().map(head_text).collect::<String>())
}

fn hex(hash: [u8; 32]) -> String {
    Digest::from(hash).to_string()
}

fn head_json(head: &AuditHead) -> Value {
    json!({
        "tenant_id": head.tenant_id,
        "seq": head.seq,
        "head": hex(head.hash),
        "unchained": head.unchained,
    })
}

fn chain_json(chain: &VerifiedChain) -> Value {
    let mut json = head_json(&chain.head);
    json["after"] = chain.after.into();
    json["removed"] = chain.removed.into();
    json
}

fn head_text(head: &AuditHead) -> String {
    let unchained = match head.unchained {
        0 => String::new(),
        count => format!(", {count} not chained yet"),
    };
    let tenant = Escaped::line(&head.tenant_id);
    format!(
        "{tenant}: head {} at seq {}{unchained}\n",
        hex(head.hash),
        head.seq
    )
}

fn chain_text(chain: &VerifiedChain) -> String {
    let mut text = head_text(&chain.head);
    if chain.after > 0 {
        text.push_str(&format!("not in this export: seq 1 to {}\n", chain.after));
    }
    if chain.removed > 0 {
        text.push_str(&format!("removed events: {}\n", chain.removed));
    }
    text
}
