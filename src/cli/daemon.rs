//! Asking the running daemon, through its admin endpoint.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::config::AdminConfig;
use crate::error::{Error, ErrorKind, Result};

/// No status and no refusal is larger.
const BODY_BYTES_MAX: u64 = 16 << 20;
/// No line is longer: it holds a key twice over, as it is and as it should be, and Redis takes up to 512 MB.
const LINE_BYTES_MAX: u64 = 2 << 30;

/// How it is asked.
#[derive(Clone, Copy, Debug)]
pub(super) enum Method {
    /// For what it knows.
    Get,
    /// To do something.
    Post,
}

/// What it answers, good news only.
pub(super) struct Answer {
    body: BufReader<TcpStream>,
}

/// Where the daemon would listen.
pub(super) fn address(config: &AdminConfig) -> Result<SocketAddr> {
    let off = || Error::new(ErrorKind::Config, "the admin endpoint is off").hint("set `[admin] listen` to an address");
    config.listen.ok_or_else(off)
}

/// That no daemon runs.
pub(super) fn nobody(address: SocketAddr) -> Error {
    Error::new(ErrorKind::Io, format!("no daemon answers on {address}"))
        .hint("start it with `keepstep run`, or name its rules file with --config")
}

/// One request, answered within `limit` up to the beginning of the body; `None` where nobody listens.
///
/// HTTP/1.0 keeps the answer in one piece, up to the end of the connection.
pub(super) async fn ask(config: &AdminConfig, method: Method, target: &str, limit: Duration) -> Result<Option<Answer>> {
    let address = address(config)?;
    let request = request(config, address, method, target);
    tokio::time::timeout(limit, exchange(address, &request)).await.unwrap_or_else(|_| Err(silent()))
}

fn request(config: &AdminConfig, address: SocketAddr, method: Method, target: &str) -> String {
    let authorization = config.token.as_ref().map(|token| format!("Authorization: Bearer {}\r\n", token.expose()));
    let method = match method {
        Method::Get => "GET",
        Method::Post => "POST",
    };
    let authorization = authorization.unwrap_or_default();
    format!("{method} {target} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n{authorization}\r\n")
}

async fn exchange(address: SocketAddr, request: &str) -> Result<Option<Answer>> {
    let mut stream = match TcpStream::connect(address).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(None),
        Err(error) => return Err(broken(error)),
    };
    stream.write_all(request.as_bytes()).await.map_err(broken)?;
    let mut body = BufReader::new(stream);
    let status_line = line(&mut body, BODY_BYTES_MAX).await?.unwrap_or_default();
    // The headers end with an empty line.
    while line(&mut body, BODY_BYTES_MAX).await?.is_some_and(|header| !header.is_empty()) {}
    let answer = Answer { body };
    match status_line.split(' ').nth(1) {
        Some("200") => Ok(Some(answer)),
        status => Err(refusal(status, &status_line, &answer.rest().await?)),
    }
}

/// A refusal with what it means for whoever runs the command.
fn refusal(status: Option<&str>, status_line: &str, body: &str) -> Error {
    let kind = match status {
        Some("400") => ErrorKind::Usage,
        Some("422") => ErrorKind::Config,
        _ => ErrorKind::Io,
    };
    let said: Vec<&str> = body.trim_end().lines().filter(|line| !line.starts_with("hint: ")).collect();
    let hints = body.lines().filter_map(|line| line.strip_prefix("hint: "));
    let message = match status {
        Some("400" | "409" | "422" | "502" | "503") if !said.is_empty() => said.join("\n"),
        _ => format!("the daemon answered `{status_line}`: {}", said.join("\n")),
    };
    hints.fold(Error::new(kind, message), Error::hint)
}

impl Answer {
    /// The whole body.
    pub(super) async fn body(self, limit: Duration) -> Result<String> {
        tokio::time::timeout(limit, self.rest()).await.unwrap_or_else(|_| Err(silent()))
    }

    async fn rest(self) -> Result<String> {
        let mut text = String::new();
        self.body.take(BODY_BYTES_MAX).read_to_string(&mut text).await.map_err(broken)?;
        Ok(text)
    }

    /// The next line of the body, whenever it comes.
    pub(super) async fn line(&mut self) -> Result<Option<String>> {
        line(&mut self.body, LINE_BYTES_MAX).await
    }
}

/// A line without its end; `None` behind the last.
async fn line(reader: &mut (impl AsyncBufRead + Unpin), bytes_max: u64) -> Result<Option<String>> {
    let mut line = String::new();
    let length = reader.take(bytes_max).read_line(&mut line).await.map_err(broken)?;
    Ok((length > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned()))
}

fn broken(error: io::Error) -> Error {
    Error::new(ErrorKind::Io, "the connection to the daemon broke").because(error)
}

fn silent() -> Error {
    Error::new(ErrorKind::Io, "the daemon did not answer").hint("is another program on that address?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_daemon_says() {
        let refused = refusal(Some("400"), "", "there is no rule `a`\nhint: did you mean `b`?\n");
        assert_eq!((refused.kind(), refused.to_string().as_str()), (ErrorKind::Usage, "there is no rule `a`"));
        assert_eq!(refused.hints(), ["did you mean `b`?"]);
        assert_eq!(refusal(Some("422"), "", "error: x\n").kind(), ErrorKind::Config);
        let other = refusal(Some("404"), "HTTP/1.0 404 Not Found", "");
        assert_eq!(other.to_string(), "the daemon answered `HTTP/1.0 404 Not Found`: ");
    }
}
