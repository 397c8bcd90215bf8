//! A TCP proxy between the daemon and a server, which can cut connections, hold back bytes, and refuse new ones.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The state of the link.
#[derive(Clone, Copy)]
struct Link {
    /// The loopback port that new connections lead to.
    target: u16,
    /// How often it was cut; a connection lives in one generation.
    generation: u64,
    /// Connections stay open, but no byte passes.
    stalled: bool,
    /// New connections are closed at once.
    refusing: bool,
}

/// A link to a loopback port, good until told otherwise.
pub(crate) struct Proxy {
    /// Where to connect instead.
    pub(crate) port: u16,
    link: watch::Sender<Link>,
    listener: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `target`.
    pub(crate) async fn to(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (link, watcher) = watch::channel(Link { target, generation: 0, stalled: false, refusing: false });
        let listener = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if !watcher.borrow().refusing {
                    tokio::spawn(connect(client, watcher.clone()));
                }
            }
        });
        Proxy { port, link, listener }
    }

    /// Ends every connection, in the middle of whatever it carries. New ones work.
    pub(crate) fn cut(&self) {
        self.link.send_modify(|link| link.generation += 1);
    }

    /// Ends every connection. New ones lead to another server, as behind an address that moves at a failover.
    pub(crate) fn retarget(&self, target: u16) {
        self.link.send_modify(|link| link.target = target);
        self.cut();
    }

    /// Ends every connection and refuses new ones.
    pub(crate) fn refuse(&self) {
        self.link.send_modify(|link| link.refusing = true);
        self.cut();
    }

    /// Holds back every byte, in both directions.
    pub(crate) fn stall(&self) {
        self.link.send_modify(|link| link.stalled = true);
    }

    /// Passes everything again.
    pub(crate) fn resume(&self) {
        self.link.send_modify(|link| (link.stalled, link.refusing) = (false, false));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listener.abort();
        self.cut();
    }
}

/// Carries one connection until an end closes it or it is cut.
async fn connect(client: TcpStream, link: watch::Receiver<Link>) {
    let Link { target, generation, .. } = *link.borrow();
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let there = pump(from_client, to_server, link.clone());
    let back = pump(from_server, to_client, link.clone());
    tokio::select! {
        _ = async { tokio::join!(there, back) } => {}
        () = until(link, |link| link.generation != generation) => {}
    }
}

/// Passes bytes on as they come, unless the link is stalled.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, link: watch::Receiver<Link>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        until(link.clone(), |link| !link.stalled).await;
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// Waits for a state of the link; a proxy that is gone has none any more, and waits for ever.
async fn until(mut link: watch::Receiver<Link>, state: impl Fn(&Link) -> bool) {
    if link.wait_for(state).await.is_err() {
        std::future::pending::<()>().await;
    }
}
