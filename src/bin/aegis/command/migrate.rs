//! `aegis migrate`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aegis_hitl::store::{
    Migrated, Migration, MigrationProgress, MigrationStep, PostgresBuilder, StoreError,
};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::Context;
use crate::config;
use crate::failure::Failure;
use crate::print::{print, print_json, say};
use crate::store::{self, Place};

/// How often a line tells how far it has come, where there is no terminal.
const EACH: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The database file to move into a PostgreSQL database, with all that is on record; with --to.
    ///
    /// No server may have it open, and none opens it any more. If the move is cut off, the same
    /// command goes on with it.
    #[arg(long, env = "AEGIS_MIGRATE_FROM", value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,

    /// The PostgreSQL database to move into, which must be empty:
    /// postgres://user@host:5432/database. Without a pooler.
    ///
    /// Its password can be in PGPASSWORD.
    #[arg(
        long,
        env = "AEGIS_MIGRATE_TO",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(crate) to: Option<PathBuf>,

    /// Gives up a move that is not finished: empties the PostgreSQL database, and lets servers open
    /// the file again. Without --to, the PostgreSQL database is gone, and is left out.
    #[arg(long)]
    pub(crate) abandon: bool,

    /// Without --from: the database whose schema is brought up to date, a file or
    /// postgres://user@host:5432/database [default: aegis.db].
    #[arg(
        long,
        env = "AEGIS_STORE",
        value_name = "FILE|URL",
        hide_env_values = true
    )]
    pub(crate) store: Option<PathBuf>,

    /// The URL of the PostgreSQL database of --store without its pooler [default: --store].
    #[arg(
        long,
        env = "AEGIS_STORE_DIRECT",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(crate) store_direct: Option<String>,

    /// Prints JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Moves a database, or brings its schema up to date.
pub(crate) async fn run(args: Migrate, context: Context) -> Result<(), Failure> {
    match (args.from, args.to) {
        (Some(from), Some(to)) => {
            let from = store::file(from)?;
            let to = target(to)?;
            match args.abandon {
                true => {
                    let abandoned = Migration::new(&from, to).abandon().await;
                    abandoned.map_err(unmoved)?;
                    abandoned_from(&from, args.json)
                }
                false => move_all(&from, to, args.json).await,
            }
        }
        (Some(from), None) if args.abandon => {
            let from = store::file(from)?;
            let abandoned = Migration::abandon_without_target(&from).await;
            abandoned.map_err(unmoved)?;
            abandoned_from(&from, args.json)
        }
        (Some(_), None) => Err(Failure::usage(
            "there is a database to move (--from) and nothing to move it into; allowed is --to with \
             postgres://user@host:5432/database",
        )),
        (None, to) if to.is_some() || args.abandon => Err(Failure::usage(
            "there is no database to move; allowed is --from with a database file",
        )),
        (None, _) => {
            let store = args.store.or(context.config.serve.store);
            let store = store.unwrap_or_else(|| PathBuf::from(config::STORE));
            let direct = args.store_direct.or(context.config.serve.store_direct);
            bring_up_to_date(store, direct, args.json).await
        }
    }
}

/// The database to move into.
fn target(to: PathBuf) -> Result<PostgresBuilder, Failure> {
    match Place::new(to, None, false)? {
        Place::Postgres(builder) => Ok(builder),
        Place::File(_) => Err(Failure::usage(
            "the database to move into (--to) is a file; allowed is postgres://user@host:5432/database",
        )),
    }
}

fn unmoved(error: StoreError) -> Failure {
    Failure::other("the database is not moved").because(error)
}

async fn move_all(from: &Path, to: PostgresBuilder, json: bool) -> Result<(), Failure> {
    let mut shown = Shown::new();
    let moved = Migration::new(from, to)
        .run(|progress| shown.tell(progress))
        .await;
    shown.end();
    let moved = moved.map_err(unmoved)?;
    say(
        "start servers with the PostgreSQL database alone; if this file is a copy of one that a server \
         still has open, end that server now",
    );
    if json {
        return print_json(&moved_json(&moved));
    }
    let rows = |name| {
        let mut tables = moved.tables.iter();
        tables
            .find(|table| table.name == name)
            .map_or(0, |table| table.rows)
    };
    print(&format!(
        "{} is moved to PostgreSQL at {}: {} actions, {} events, each row compared\n",
        from.display(),
        moved.place,
        rows("action"),
        rows("event"),
    ))
}

fn moved_json(moved: &Migrated) -> serde_json::Value {
    let tables = moved.tables.iter().map(|table| {
        let digest = table.digest.to_string();
        (
            table.name.to_owned(),
            json!({ "rows": table.rows, "sha256": digest }),
        )
    });
    let tables: serde_json::Map<_, _> = tables.collect();
    json!({ "moved": true, "to": moved.place, "tables": tables })
}

fn abandoned_from(from: &Path, json: bool) -> Result<(), Failure> {
    if json {
        return print_json(&json!({ "abandoned": true }));
    }
    print(&format!(
        "the move of {} is given up; servers may open it again\n",
        from.display()
    ))
}

async fn bring_up_to_date(
    store: PathBuf,
    direct: Option<String>,
    json: bool,
) -> Result<(), Failure> {
    let failed = |error| Failure::other("the schema is not brought up to date").because(error);
    let shown = match Place::new(store, direct, false)? {
        Place::File(path) => {
            if !path.is_file() {
                return Err(Failure::other(format!(
                    "there is no file {}; 'aegis serve' makes it",
                    path.display()
                )));
            }
            store::open(&path)?.close().await;
            path.display().to_string()
        }
        Place::Postgres(builder) => builder.migrate_schema().await.map_err(failed)?,
    };
    if json {
        return print_json(&json!({ "migrated": true, "store": shown }));
    }
    print(&format!("the schema of {shown} is that of this release\n"))
}

/// How far a move has come, on stderr: a bar on a terminal, and else a line each second.
struct Shown {
    bar: Option<ProgressBar>,
    told: Option<(MigrationStep, &'static str, Instant)>,
}

impl Shown {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) =
                ProgressStyle::with_template("{msg:24} {wide_bar} {human_pos}/{human_len} {eta}")
            {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, told: None }
    }

    fn tell(&mut self, progress: MigrationProgress) {
        let MigrationProgress {
            step,
            table,
            rows,
            of,
            ..
        } = progress;
        let doing = match step {
            MigrationStep::Copying => format!("copying {table}"),
            MigrationStep::Comparing => format!("comparing {table}"),
            _ => "checking the file".to_owned(),
        };
        if let Some(bar) = &self.bar {
            bar.set_message(doing);
            bar.set_length(of);
            bar.set_position(rows);
            return;
        }
        let is_told = self.told.is_some_and(|(told, name, at)| {
            (told, name) == (step, table) && at.elapsed() < EACH && rows < of
        });
        if is_told || (rows == of && of == 0 && !table.is_empty()) {
            return;
        }
        self.told = Some((step, table, Instant::now()));
        say(&match table {
            "" => doing,
            _ => format!("{doing}: {rows} of {of}"),
        });
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
