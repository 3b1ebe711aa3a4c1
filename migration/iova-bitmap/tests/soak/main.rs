//! Many random operations against a naive model.

#[cfg(test)]
mod random;
