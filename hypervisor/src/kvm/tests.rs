//! Tests on the real device.
