//! The form of a small part's saved state: a version, then a struct, as `postcard`.
//!
//! Saved state comes back from another host or a file, so it is not trusted: its length is
//! checked before it is looked at, its version before its fields, and nothing may follow it.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::state::StateError;

/// Bytes of `state` in `version` of its form, for part `id`.
///
/// # Errors
/// [`StateError::Failed`] if a field cannot be written, such as a sequence of unknown length.
pub fn encode<T: Serialize>(id: &str, version: u16, state: &T) -> Result<Vec<u8>, StateError> {
    postcard::to_stdvec(&(version, state)).map_err(|cause| StateError::Failed {
        id: id.to_owned(),
        operation: "save",
        cause: Box::new(cause),
    })
}

/// The state that [`encode`] wrote in the same version, at most `limit` bytes of it.
///
/// # Errors
/// [`StateError::BadState`] if it is longer, of another version, cut, or followed by something.
pub fn decode<T: DeserializeOwned>(
    id: &str,
    version: u16,
    limit: usize,
    bytes: &[u8],
) -> Result<T, StateError> {
    let bad = |reason: String| StateError::BadState {
        id: id.to_owned(),
        reason,
    };
    if bytes.len() > limit {
        return Err(bad(format!("{} bytes, limit {limit}", bytes.len())));
    }
    let malformed = |error: postcard::Error| bad(error.to_string());
    let (found, fields) = postcard::take_from_bytes::<u16>(bytes).map_err(malformed)?;
    if found != version {
        return Err(bad(format!("version {found}, {version} is known")));
    }
    match postcard::take_from_bytes(fields).map_err(malformed)? {
        (state, []) => Ok(state),
        (_, rest) => Err(bad(format!("{} bytes too many", rest.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(result: Result<(u32, String), StateError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_was_saved_comes_back_and_nothing_else_does() {
        let state = (7u32, "seven".to_owned());
        let bytes = encode("rtc", 300, &state).unwrap();
        let limit = bytes.len();
        let back: (u32, String) = decode("rtc", 300, limit, &bytes).unwrap();
        assert_eq!(back, state);
        let too_long = decode("rtc", 300, limit - 1, &bytes);
        assert!(reason(too_long).contains("rtc: saved state is not acceptable: 9 bytes, limit 8"));
        let other = decode("rtc", 1, limit, &bytes);
        assert!(reason(other).contains("version 300, 1 is known"));
        for cut in 0..limit {
            reason(decode("rtc", 300, limit, &bytes[..cut]));
        }
        let followed = [&bytes[..], &[0]].concat();
        assert!(reason(decode("rtc", 300, 99, &followed)).contains("1 bytes too many"));
    }
}
