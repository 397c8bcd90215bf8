//! The real `keepstep` binary, running.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use keepstep::sandbox::Keeper;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Stage, wait_for};

/// `keepstep run` on a rules file. Killed when dropped; a failing test shows its log.
pub(crate) struct Daemon {
    child: Child,
    _keeper: Keeper,
    admin: u16,
    log: PathBuf,
}

impl Daemon {
    /// Starts it with more arguments behind `run -c FILE`, and does not wait.
    pub(crate) fn spawn(stage: &Stage, rules: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.arg("run").arg("-c").arg(rules).args(arguments);
        Self::of(stage, command)
    }

    /// Starts it with another environment, and does not wait.
    pub(crate) fn spawn_in(stage: &Stage, rules: &Path, variable: Option<(&str, &str)>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.arg("run").arg("-c").arg(rules).envs(variable);
        Self::of(stage, command)
    }

    fn of(stage: &Stage, mut command: Command) -> Self {
        let log = stage.folder().join("keepstep.log");
        let errors = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        let keeper = Keeper::new(&child, stage.folder()).unwrap();
        Daemon { child, _keeper: keeper, admin: stage.admin, log }
    }

    /// Starts it and waits until it follows the stream.
    pub(crate) async fn start(stage: &Stage, rules: &Path) -> Self {
        let mut daemon = Self::spawn(stage, rules, &[]);
        daemon.ready().await;
        daemon
    }

    /// Waits until `/ready` says so; the daemon must not end meanwhile.
    pub(crate) async fn ready(&mut self) {
        wait_for("the daemon to be ready", async || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended: {status}");
            }
            self.get("/ready").await.is_some_and(|(status, _)| status == 200).then_some(())
        })
        .await;
    }

    /// What the admin endpoint answers: status and body; `None` where nothing answers.
    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        self.request("GET", path, "").await
    }

    /// The same of a command, sent with more headers, each with its `\r\n`.
    pub(crate) async fn post(&self, target: &str, headers: &str) -> Option<(u16, String)> {
        self.request("POST", target, headers).await
    }

    async fn request(&self, method: &str, target: &str, headers: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).await.ok()?;
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n"
        );
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }

    /// The sum over all label values of a metric; `None` where it has not been counted yet.
    pub(crate) async fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics").await?;
        let series = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        series.map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// The most memory it has held so far, in KiB.
    pub(crate) fn resident_peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it logs to.
    pub(crate) fn log_path(&self) -> PathBuf {
        self.log.clone()
    }

    /// What it has logged so far, earlier runs on the same stage included.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and how it ended.
    pub(crate) async fn terminate(self) -> ExitStatus {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.end().await
    }

    /// How it ended by itself.
    pub(crate) async fn end(mut self) -> ExitStatus {
        wait_for("the daemon to end", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- keepstep.log ----\n{}----", self.log());
        }
    }
}
