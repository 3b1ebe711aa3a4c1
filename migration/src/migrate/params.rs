//! What the operator asks of a migration.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What to do when the time is up before the guest could be moved within the downtime.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeoutStrategy {
    /// Give up: the guest runs on at the source.
    #[default]
    Cancel,
    /// Move it anyway, however long it then stands still.
    Ignore,
}

/// The parameters of one migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrationParams {
    /// Longest the guest should stand still, in milliseconds.
    pub downtime_ms: u64,
    /// Longest the migration may take until the switchover, in seconds.
    pub timeout_s: u64,
    /// What happens then.
    pub timeout_strategy: TimeoutStrategy,
    /// Most bytes per second to send while the guest runs; `None` or 0 sends all the network
    /// takes. Not applied while the guest stands still.
    pub max_bandwidth: Option<u64>,
    /// How often, all in all, a dirty log that fails is started anew while the guest runs, all of
    /// its memory being sent again; the next failure, and any while the guest stands still, ends
    /// the migration with the guest at the source.
    pub dirty_log_restarts: u32,
}

impl Default for MigrationParams {
    /// The defaults of Cloud Hypervisor: 300 ms, one hour, cancel, no limit. Three restarts of
    /// dirty logs.
    fn default() -> Self {
        Self {
            downtime_ms: 300,
            timeout_s: 3600,
            timeout_strategy: TimeoutStrategy::default(),
            max_bandwidth: None,
            dirty_log_restarts: 3,
        }
    }
}

impl MigrationParams {
    /// [`downtime_ms`](Self::downtime_ms).
    pub fn downtime(&self) -> Duration {
        Duration::from_millis(self.downtime_ms)
    }

    /// [`timeout_s`](Self::timeout_s).
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_s)
    }

    /// [`max_bandwidth`](Self::max_bandwidth), if there is a limit.
    pub fn bandwidth_limit(&self) -> Option<u64> {
        self.max_bandwidth.filter(|limit| *limit > 0)
    }
}
