//! Each way of keeping a dirty log, on the real device: exactly the pages written, and none lost.

#[cfg(test)]
mod common;
#[cfg(test)]
mod copying;
#[cfg(test)]
mod methods;
#[cfg(test)]
mod ring3;
