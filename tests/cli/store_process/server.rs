//! What a server does when its store takes nothing any more.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use tempfile::TempDir;

use super::sync::library;
use crate::binary::{Served, serve};

/// The status of an approval, or 0 if there is no answer.
fn approve(server: &Served) -> u16 {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(server.addr)?;
        stream.write_all(
            b"POST /api/v1/hitl/approve HTTP/1.1\r\nHost: localhost\r\nTenant-Id: t\r\nThread-Id: t\r\n\
              Idempotency-Key: k\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().unwrap_or_default();
    let status = answer.split(' ').nth(1).map(str::parse);
    status.map_or(0, Result::unwrap)
}

#[test]
fn a_server_whose_writer_panics_ends_and_says_so() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let order = folder.path().join("order");
    let Some(library) = library(folder.path()) else {
        return;
    };
    let mut command = serve(&path);
    command
        .env("LD_PRELOAD", library)
        .env("AEGIS_TEST_ORDER", &order);
    let server = Served::start(command);
    assert_eq!(approve(&server), 202);
    fs::write(&order, "clock aegis-writer").unwrap();
    assert!(matches!(approve(&server), 0 | 503));
    let ended = server.ended().expect(1);
    assert!(
        ended
            .stderr
            .contains("aegis: the store's writer has failed"),
        "{ended:?}"
    );

    // Nothing is left behind that keeps the next one from starting.
    let server = Served::start(serve(&path));
    assert!(matches!(approve(&server), 202 | 409));
    server.stop().expect(0);
}

#[test]
fn a_server_whose_database_is_renamed_answers_503_and_says_so_once() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("aegis.db");
    let server = Served::start(serve(&path));
    assert_eq!(approve(&server), 202);
    fs::rename(&path, folder.path().join("elsewhere.db")).unwrap();
    for _ in 0..3 {
        assert_eq!(approve(&server), 503);
    }
    let ended = server.stop().expect(0);
    let lines = ended.stderr.lines();
    let errors: Vec<_> = lines.filter(|line| line.contains("ERROR")).collect();
    assert_eq!(errors.len(), 1, "{ended:?}");
    let how = "the database file was renamed, removed or replaced while it was open";
    assert!(errors[0].contains(how), "{ended:?}");
    assert!(!path.exists());
}
