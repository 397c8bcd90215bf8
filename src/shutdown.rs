//! SIGTERM and SIGINT: the first asks for an orderly end, a second one ends at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Error, ErrorKind, Result};

/// Tells whether the end was asked for.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: watch::Receiver<bool>,
}

impl Shutdown {
    /// Listens to the signals from now on.
    pub fn listen() -> Result<Self> {
        let cannot = |error| Error::new(ErrorKind::Io, "cannot listen to signals").because(error);
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        let (sender, requested) = watch::channel(false);
        tokio::spawn(async move {
            let mut next = async || tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} };
            next().await;
            tracing::info!("ending: what is under way is finished first; a second signal ends at once");
            // Nobody listens any more only where the end has come already.
            let _ = sender.send(true);
            next().await;
            std::process::exit(1);
        });
        Ok(Shutdown { requested })
    }

    /// Returns once the end was asked for.
    pub async fn requested(&mut self) {
        if self.requested.wait_for(|requested| *requested).await.is_err() {
            // The listener is gone, so nothing will ever ask.
            std::future::pending::<()>().await;
        }
    }
}
