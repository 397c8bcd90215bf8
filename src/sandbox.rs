//! Private throw-away Postgres and Redis servers, for `keepstep demo`, the tests and the benchmark.
//!
//! Each server gets a free loopback port and a temporary directory, and ends when it is dropped, by its own pid.
//! Where nothing is dropped, because this process was killed, a [`Keeper`] ends it.
//! Postgres refuses to run as root, so it is started as an unprivileged user then.

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often that is looked at.
const START_POLL: Duration = Duration::from_millis(20);
/// Ports below those that Linux gives to connections (`ip_local_port_range` begins at 32768), which come and go.
const PORT_FIRST: u16 = 12_000;
const PORT_COUNT: u16 = 20_000;
/// How many of them are tried.
const PORT_TRIES: u32 = 1000;

/// The throw-away servers could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No such program in the usual places.
    #[error("`{program}` was not found\n\nhint: {hint}")]
    Missing {
        /// The program.
        program: &'static str,
        /// How to install it.
        hint: &'static str,
    },
    /// A program ran and failed.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// The program.
        command: String,
        /// What it said.
        output: String,
    },
    /// The server did not answer in time.
    #[error("{server} did not answer within {START_LIMIT:?}; its log says:\n{log}")]
    Silent {
        /// Which server.
        server: String,
        /// The end of its log.
        log: String,
    },
    /// Files, processes or sockets.
    #[error("{0}")]
    Io(#[from] io::Error),
}

type Result<T> = std::result::Result<T, SandboxError>;

/// A loopback port that nothing listens on at this moment.
pub fn free_port() -> io::Result<u16> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..PORT_TRIES {
        let random = getrandom::u32().map_err(|_| io::ErrorKind::Unsupported)?;
        let port = PORT_FIRST + (random % u32::from(PORT_COUNT)) as u16;
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A Postgres installation: the folder that holds `initdb` and `postgres`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresInstall {
    /// Its `bin` folder.
    pub bin: PathBuf,
    /// Its major version.
    pub major: u32,
}

impl PostgresInstall {
    /// The installation in `bin`, if there is one.
    pub fn in_folder(bin: &Path) -> Option<Self> {
        let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        let major = version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        bin.join("initdb").exists().then(|| PostgresInstall { bin: bin.to_owned(), major })
    }

    /// The one to use: `KEEPSTEP_PG_BIN`, else the newest that the system has.
    pub fn find() -> Result<Self> {
        if let Some(bin) = std::env::var_os("KEEPSTEP_PG_BIN") {
            return Self::in_folder(Path::new(&bin)).ok_or(SandboxError::Missing {
                program: "postgres",
                hint: "KEEPSTEP_PG_BIN must name a folder that holds `initdb` and `postgres`",
            });
        }
        let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let folders = debian.map(|entry| entry.path().join("bin")).chain(std::env::split_paths(&on_path));
        folders
            .filter_map(|bin| Self::in_folder(&bin))
            .max_by_key(|install| install.major)
            .ok_or(SandboxError::Missing { program: "postgres", hint: "apt-get install postgresql (Debian, Ubuntu)" })
    }
}

/// Ends a child and removes a folder should this process die without doing so itself, be it by SIGKILL.
///
/// It is a shell that reads from a pipe whose other end only this process holds, so it wakes at whatever end.
#[derive(Debug)]
pub struct Keeper {
    shell: Child,
}

impl Keeper {
    /// INT is a fast shutdown for Postgres, a plain one for Redis and for keepstep; none takes longer than five seconds.
    const SCRIPT: &str = r#"
        read -r _
        kill -INT "$1"
        for _ in $(seq 50); do kill -0 "$1" || break; sleep 0.1; done
        rm -rf "$2"
    "#;

    /// Watches over the child and its folder until it is dropped.
    pub fn new(child: &Child, folder: &Path) -> io::Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", Self::SCRIPT, "keeper", &child.id().to_string()]).arg(folder);
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // A group of its own: a Ctrl-C that ends this process must not end its keeper too.
        Ok(Keeper { shell: shell.process_group(0).spawn()? })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

/// A server that runs, and its keeper.
#[derive(Debug)]
struct Running {
    child: Child,
    keeper: Keeper,
}

impl Running {
    fn spawn(command: &mut Command, folder: &Path) -> io::Result<Self> {
        // A group of its own: Ctrl-C in the terminal reaches keepstep alone, which then ends its servers in order.
        let child = command.stdin(Stdio::null()).process_group(0).spawn()?;
        let keeper = Keeper::new(&child, folder)?;
        Ok(Running { child, keeper })
    }

    /// Sends `signal` and waits for the end.
    fn end(self, signal: &str) -> Result<()> {
        let Running { mut child, keeper } = self;
        drop(keeper);
        run(Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()))?;
        child.wait()?;
        Ok(())
    }
}

/// A private Postgres cluster with `wal_level = logical`; superuser `postgres`, no password, database `postgres`.
#[derive(Debug)]
pub struct Postgres {
    /// Where it comes from.
    pub install: PostgresInstall,
    /// Its loopback port; it also listens on a Unix socket in [`Postgres::folder`].
    pub port: u16,
    folder: tempfile::TempDir,
    server: Option<Running>,
}

impl Postgres {
    /// Makes and starts a cluster; `settings` are lines for `postgresql.conf`.
    pub fn start(settings: &str) -> Result<Self> {
        let mut cluster = Self::unmade(PostgresInstall::find()?)?;
        cluster.initdb()?;
        cluster.configure(settings)?;
        cluster.resume()?;
        Ok(cluster)
    }

    /// The same, many times faster, with a copy of the cluster in `templates`, which is made first if it is missing.
    ///
    /// All copies share one system identifier.
    pub fn start_copy(templates: &Path, settings: &str) -> Result<Self> {
        let mut cluster = Self::unmade(PostgresInstall::find()?)?;
        let made_by = cluster.install.bin.to_string_lossy().replace('/', "-");
        let template = templates.join(format!("cluster-{}{made_by}", cluster.install.major));
        if template.exists() {
            run(Command::new("cp").arg("-a").arg(&template).arg(cluster.data()))?;
        } else {
            cluster.initdb()?;
            // A folder under its last name is whole: rename is atomic, and whoever comes second changes nothing.
            let copy = tempfile::Builder::new().prefix("cluster-").tempdir_in(templates)?;
            run(Command::new("cp").arg("-a").arg(cluster.data()).arg(copy.path()))?;
            let _ = fs::rename(copy.path().join("data"), &template);
        }
        cluster.configure(settings)?;
        cluster.resume()?;
        Ok(cluster)
    }

    fn unmade(install: PostgresInstall) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("keepstep-pg-").tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        if let Some((uid, gid)) = unprivileged() {
            chown(folder.path(), Some(uid), Some(gid))?;
        }
        Ok(Postgres { install, port: free_port()?, folder, server: None })
    }

    fn initdb(&self) -> Result<()> {
        let mut initdb = self.command("initdb");
        initdb.args(["--no-sync", "--locale=C", "--encoding=UTF8", "--auth=trust", "--username=postgres", "-D"]);
        run(initdb.arg(self.data()))?;
        Ok(())
    }

    fn configure(&self, settings: &str) -> Result<()> {
        let path = self.data().join("postgresql.conf");
        let shipped = fs::read_to_string(&path)?;
        let own = format!(
            "port = {}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nwal_level = logical\n\
             fsync = off\nmax_wal_senders = 20\nmax_replication_slots = 20\nlogging_collector = off\n{settings}\n",
            self.port,
            self.folder.path().display(),
        );
        fs::write(path, shipped + &own)?;
        Ok(())
    }

    /// A streaming standby that calls itself `name` and looks for this cluster at the loopback port `primary`.
    ///
    /// It is a copy, for which this cluster is stopped. Behind that `settings` hold for this cluster and not for the
    /// standby, as `synchronous_standby_names`.
    pub fn standby(&mut self, name: &str, primary: u16, settings: &str) -> Result<Self> {
        let mut standby = Self::unmade(self.install.clone())?;
        self.stop("INT")?;
        run(Command::new("cp").arg("-a").arg(self.data()).arg(standby.data()))?;
        self.configure(settings)?;
        self.resume()?;
        let conninfo = format!("host=127.0.0.1 port={primary} user=postgres application_name={name}");
        standby.configure(&format!("primary_conninfo = '{conninfo}'"))?;
        let signal = standby.data().join("standby.signal");
        fs::write(&signal, "")?;
        if let Some((uid, gid)) = unprivileged() {
            chown(signal, Some(uid), Some(gid))?;
        }
        standby.resume()?;
        Ok(standby)
    }

    /// Its temporary folder, which holds the data, the socket and the log.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its data directory.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The URL of one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!("postgresql://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The pid of its postmaster while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(|server| server.child.id())
    }

    /// A program of this installation, run as the user that owns the cluster, with `PGHOST` and the like set.
    ///
    /// One that the installation lacks (some ship the server alone, without `psql`) is the system's.
    pub fn command(&self, program: &str) -> Command {
        let own = self.install.bin.join(program);
        let mut command = if own.exists() { Command::new(own) } else { Command::new(program) };
        command.current_dir(self.folder.path()).env("LC_ALL", "C");
        command.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        if let Some((uid, gid)) = unprivileged() {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Starts the stopped server again.
    pub fn resume(&mut self) -> Result<()> {
        let log = fs::File::create(self.folder.path().join("log"))?;
        let mut server = self.command("postgres");
        server.arg("-D").arg(self.data()).stdout(log.try_clone()?).stderr(log);
        self.server = Some(Running::spawn(&mut server, self.folder.path())?);
        let ready = self.data().join("postmaster.pid");
        // The eighth line of postmaster.pid (src/backend/utils/init/miscinit.c) says when it takes connections.
        wait_until(|| {
            fs::read_to_string(&ready).is_ok_and(|text| text.lines().nth(7).is_some_and(|l| l.trim() == "ready"))
        })
        .then_some(())
        .ok_or_else(|| SandboxError::Silent {
            server: "Postgres".to_owned(),
            log: tail(&self.folder.path().join("log")),
        })
    }

    /// Stops the server: `TERM` waits for its clients, `INT` does not (fast), `QUIT` is a crash (immediate).
    pub fn stop(&mut self, signal: &str) -> Result<()> {
        self.server.take().map_or(Ok(()), |server| server.end(signal))
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // QUIT: nobody needs this cluster again, and its clients may still be connected.
        let _ = self.stop("QUIT");
    }
}

/// A private Redis (or Valkey) server.
#[derive(Debug)]
pub struct RedisServer {
    /// Its loopback port.
    pub port: u16,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    server: Option<Running>,
}

impl RedisServer {
    /// Starts a server without persistence; `arguments` are added to its command line, as `--appendonly yes`.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("keepstep-redis-").tempdir()?;
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let mut server = RedisServer { port: free_port()?, folder, arguments, server: None };
        server.resume()?;
        Ok(server)
    }

    /// Its temporary folder, which holds its files, its log and its Unix socket `redis.sock`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// The pid of the server while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(|server| server.child.id())
    }

    /// Starts the stopped server again, on the same port and folder.
    pub fn resume(&mut self) -> Result<()> {
        let program = std::env::var_os("KEEPSTEP_REDIS_SERVER").unwrap_or_else(|| "redis-server".into());
        let log = self.folder.path().join("log");
        let mut server = Command::new(&program);
        server.args([
            "--port",
            &self.port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--unixsocket",
            "redis.sock",
        ]);
        server.arg("--dir").arg(self.folder.path()).arg("--logfile").arg(&log).args(&self.arguments);
        server.stdout(Stdio::null()).stderr(Stdio::null());
        self.server = Some(Running::spawn(&mut server, self.folder.path()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => SandboxError::Missing {
                program: "redis-server",
                hint: "apt-get install redis-server (Debian, Ubuntu), or name one in KEEPSTEP_REDIS_SERVER",
            },
            _ => SandboxError::Io(error),
        })?);
        let socket = self.folder.path().join("redis.sock");
        wait_until(|| has_loaded(&socket).unwrap_or(false))
            .then_some(())
            .ok_or_else(|| SandboxError::Silent { server: "Redis".to_owned(), log: tail(&log) })
    }

    /// Stops the server: `TERM` saves and exits, `KILL` is a crash.
    pub fn stop(&mut self, signal: &str) -> Result<()> {
        self.server.take().map_or(Ok(()), |server| server.end(signal))
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.stop("KILL");
    }
}

/// The user and group Postgres runs as when this process is root: `postgres`, else `nobody`.
fn unprivileged() -> Option<(u32, u32)> {
    let root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    let passwd = root.then(|| fs::read_to_string("/etc/passwd").ok()).flatten()?;
    let ids = |user: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(user))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    ids("postgres").or_else(|| ids("nobody"))
}

/// Whether a Redis server has read its files and takes commands; whether it demands a password does not matter.
fn has_loaded(socket: &Path) -> io::Result<bool> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(START_LIMIT))?;
    stream.write_all(b"PING\r\n")?;
    let mut reply = [0; 64];
    let length = stream.read(&mut reply)?;
    Ok(length > 0 && !reply.starts_with(b"-LOADING"))
}

fn run(command: &mut Command) -> Result<Output> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(output);
    }
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Err(SandboxError::Failed { command: format!("{:?}", command.get_program()), output: said })
}

fn wait_until(condition: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < START_LIMIT {
        if condition() {
            return true;
        }
        std::thread::sleep(START_POLL);
    }
    false
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
