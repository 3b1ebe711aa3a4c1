//! Replies of a hostile server: every call of the client ends, with an answer that keeps to what
//! was asked or with an error.

#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use vfio_user::wire::{HEADER_SIZE, Header};
use vfio_user::{Area, Client, ClientConfig};
use zerocopy::{FromBytes, IntoBytes};

/// One answer: like the right one but for what is given here.
#[derive(Arbitrary, Debug)]
struct Answer {
    flags: Option<u32>,
    error: u32,
    id: Option<u16>,
    command: Option<u16>,
    size: Option<u32>,
    /// A command of the server's own before it.
    unasked: Option<(u16, Vec<u8>)>,
    payload: Vec<u8>,
}

fn header_of(len: usize) -> u32 {
    u32::try_from(HEADER_SIZE + len).unwrap()
}

fn serve(mut stream: UnixStream, hello: bool, answers: Vec<Answer>) {
    let version = Answer {
        flags: None,
        error: 0,
        id: None,
        command: None,
        size: None,
        unasked: None,
        payload: b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":2,\"max_data_xfer_size\":40}}\0"
            .to_vec(),
    };
    let first = hello.then_some(version);
    for answer in first.into_iter().chain(answers) {
        let mut bytes = [0; HEADER_SIZE];
        if stream.read_exact(&mut bytes).is_err() {
            return;
        }
        let asked = Header::read_from_bytes(&bytes).unwrap();
        let mut payload = vec![0; usize::try_from(asked.size).unwrap() - HEADER_SIZE];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        let mut out = Vec::new();
        if let Some((command, payload)) = answer.unasked {
            let header = Header {
                id: asked.id,
                command,
                size: header_of(payload.len()),
                // No reply: this server does not wait for any.
                flags: 1 << 4,
                error: 0,
            };
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&payload);
        }
        let header = Header {
            id: answer.id.unwrap_or(asked.id),
            command: answer.command.unwrap_or(asked.command),
            size: answer.size.unwrap_or(header_of(answer.payload.len())),
            flags: answer.flags.unwrap_or(1),
            error: answer.error,
        };
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&answer.payload);
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

fn within(areas: &[Area], size: u64) {
    for area in areas {
        assert!(area.offset.checked_add(area.size).unwrap() <= size);
    }
}

fn ask_all(client: &Client) {
    let _ = client.info();
    if let Ok(region) = client.region_info(1)
        && let Some(mapping) = region.mapping
    {
        within(&mapping.areas, region.size);
    }
    if let Ok(events) = client.region_io_fds(0, 0x100) {
        for event in events {
            assert!(event.offset + event.size <= 0x100);
        }
    }
    let _ = client.irq_info(2);
    let _ = client.region_read(0, 0, &mut [0; 50]);
    let _ = client.region_write(0, 0, &[0; 50]);
    let _ = client.migration_flags();
    let _ = client.device_state();
    let _ = client.stop_copy_size();
    let _ = client.precopy_info();
    if let Ok(got) = client.read_migration_data(&mut [0; 40]) {
        assert!(got <= 40);
    }
    let _ = client.write_migration_data(&[0; 50]);
    let whole = Area {
        offset: 0,
        size: 1 << 20,
    };
    if let Ok(page) = client.start_dma_logging(4096, &[whole]) {
        assert!(page.is_power_of_two());
    }
    let _ = client.report_dma_log(0, 1 << 20, 4096, &mut [0; 4]);
    let _ = client.dma_unmap(0, 4096);
    let _ = client.reset();
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Unstructured::new(bytes);
    let Ok((hello, answers)) = input.arbitrary::<(bool, Vec<Answer>)>() else {
        return;
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || serve(theirs, hello, answers));
        let config = ClientConfig {
            // A size field that promises more than comes costs this much.
            timeout: Duration::from_millis(20),
            transition_timeout: Duration::from_millis(20),
            ..ClientConfig::default()
        };
        if let Ok(client) = Client::from_stream(ours, Path::new("fuzz.sock"), config) {
            ask_all(&client);
        }
    });
});
