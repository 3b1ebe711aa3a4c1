//! Client and server against each other and against peers that misbehave.

#[cfg(test)]
mod common;
#[cfg(test)]
mod failures;
#[cfg(test)]
mod loopback;
