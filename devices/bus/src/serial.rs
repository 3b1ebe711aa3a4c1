//! The first serial port: a 16550 on a [`Terminal`].

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_migration::{Pause, SaveRestore, StateError, saved};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::{InterruptError, IrqLine};
use crate::terminal::{Terminal, TerminalWriter};
use crate::thread::{ThreadKind, ThreadSpawner};

/// Registers of a 16550.
pub const PORTS: u16 = 8;
/// Identifier of the port's state in a migration.
pub const ID: &str = "serial";

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = InterruptError;

    fn trigger(&self) -> Result<(), InterruptError> {
        self.0.trigger()
    }
}

/// Wakes the input thread when the guest has read all.
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter wakes as well.
        let _ = self.0.write(1);
    }
}

type Port = Uart<Line, Drained, TerminalWriter>;

/// The port.
pub struct Serial {
    port: Arc<Mutex<Port>>,
    terminal: Arc<Terminal>,
    line: Arc<dyn IrqLine>,
    stop: Arc<EventFd>,
    drained: Arc<EventFd>,
    input: Option<JoinHandle<()>>,
}

impl Serial {
    /// A port on `terminal` that interrupts by `line`. Input is taken by a thread of its own.
    ///
    /// # Errors
    /// When there is no eventfd or thread to be had.
    pub fn new(
        terminal: Terminal,
        line: Arc<dyn IrqLine>,
        spawner: &ThreadSpawner,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let drained = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let events = Drained(Arc::clone(&drained));
        let port = Uart::with_events(Line(Arc::clone(&line)), events, terminal.writer());
        let mut this = Self {
            port: Arc::new(Mutex::new(port)),
            terminal: Arc::new(terminal),
            line,
            stop,
            drained,
            input: None,
        };
        if this.terminal.has_input() {
            this.input = Some(this.start_input(spawner)?);
        }
        Ok(this)
    }

    /// The port as a device on the port-I/O bus.
    pub fn registers(&self) -> Arc<dyn BusDevice> {
        Arc::new(Registers(Arc::clone(&self.port)))
    }

    /// What the port is connected to.
    pub fn terminal(&self) -> &Terminal {
        &self.terminal
    }

    fn start_input(&self, spawner: &ThreadSpawner) -> io::Result<JoinHandle<()>> {
        let port = Arc::clone(&self.port);
        let (terminal, stop) = (Arc::clone(&self.terminal), Arc::clone(&self.stop));
        let drained = Arc::clone(&self.drained);
        spawner.spawn(ThreadKind::Serial, "serial", move || {
            let result = terminal.read_input(&stop, &drained, |bytes| {
                let mut port = port.lock();
                if let Some(bytes) = bytes
                    && let Err(error) = port.enqueue_raw_bytes(bytes)
                {
                    tracing::debug!(%error, "serial input was dropped");
                }
                port.fifo_capacity()
            });
            if let Err(error) = result {
                tracing::warn!(%error, "no more serial input");
            }
        })
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        // Without the signal the thread would not end; it cannot fail on a fresh eventfd.
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.input.take()
            && thread.join().is_err()
        {
            tracing::error!("the serial input thread panicked");
        }
    }
}

struct Registers(Arc<Mutex<Port>>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (Ok(offset), [value]) = (u8::try_from(offset), &mut *data) else {
            data.fill(0xff);
            return;
        };
        *value = self.0.lock().read(offset);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[value]) = (u8::try_from(offset), data)
            && let Err(error) = self.0.lock().write(offset, value)
        {
            tracing::debug!(%error, "serial write");
        }
    }
}

/// The port's registers, in a migration.
#[derive(Serialize, Deserialize)]
struct State {
    registers: [u8; 9],
    input: Vec<u8>,
}

const STATE_VERSION: u16 = 1;

impl Pause for Serial {
    /// Input that comes while the vCPUs stand still waits in the port, so there is nothing to stop.
    fn pause(&mut self) -> Result<(), StateError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), StateError> {
        Ok(())
    }
}

impl SaveRestore for Serial {
    const MAX_STATE_BYTES: usize = 256;

    fn expected_bytes(&self) -> usize {
        Self::MAX_STATE_BYTES
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.port.lock().state();
        let state = State {
            registers: [
                baud_divisor_low,
                baud_divisor_high,
                interrupt_enable,
                interrupt_identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
            ],
            input: in_buffer,
        };
        saved::encode(ID, STATE_VERSION, &state)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let state: State = saved::decode(ID, STATE_VERSION, Self::MAX_STATE_BYTES, bytes)?;
        let [
            low,
            high,
            enable,
            identification,
            line_control,
            line_status,
            modem,
            status,
            scratch,
        ] = state.registers;
        let registers = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control: modem,
            modem_status: status,
            scratch,
            in_buffer: state.input,
        };
        let events = Drained(Arc::clone(&self.drained));
        let line = Line(Arc::clone(&self.line));
        let port = Uart::from_state(&registers, line, events, self.terminal.writer()).map_err(
            |error| StateError::BadState {
                id: ID.into(),
                reason: error.to_string(),
            },
        )?;
        *self.port.lock() = port;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    #[derive(Default)]
    struct Count(AtomicU32);

    impl IrqLine for Count {
        fn trigger(&self) -> Result<(), InterruptError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const SCRATCH: u64 = 7;

    fn read(registers: &dyn BusDevice, offset: u64) -> u8 {
        let mut data = [0];
        registers.read(offset, &mut data);
        data[0]
    }

    fn wait_byte(registers: &dyn BusDevice) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(10);
        while read(registers, LINE_STATUS) & 1 == 0 {
            assert!(Instant::now() < deadline, "no input came");
            std::thread::sleep(Duration::from_millis(1));
        }
        read(registers, DATA)
    }

    #[test]
    fn output_goes_to_the_file_and_state_moves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let new = || {
            let terminal = Terminal::file(&path).unwrap();
            Serial::new(
                terminal,
                Arc::new(Count::default()),
                &ThreadSpawner::unconfined(),
            )
            .unwrap()
        };
        let mut serial = new();
        let registers = serial.registers();
        for byte in b"hello" {
            registers.write(DATA, &[*byte]);
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"hello");
        registers.write(SCRATCH, &[0x5a]);
        registers.write(INTERRUPT_ENABLE, &[1]);
        let state = serial.save().unwrap();
        assert!(state.len() <= Serial::MAX_STATE_BYTES);
        let mut other = new();
        let registers = other.registers();
        other.restore(&state).unwrap();
        assert_eq!(read(&*registers, SCRATCH), 0x5a);
        assert_eq!(read(&*registers, INTERRUPT_ENABLE), 1);
        assert!(other.restore(b"\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn a_socket_client_talks_both_ways_more_than_a_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let terminal = Terminal::socket(&path).unwrap();
        let line = Arc::new(Count::default());
        let serial = Serial::new(terminal, line.clone(), &ThreadSpawner::unconfined()).unwrap();
        let registers = serial.registers();
        registers.write(INTERRUPT_ENABLE, &[1]);
        registers.write(DATA, b"x");
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            let sent: Vec<u8> = (0..200u8).collect();
            client.write_all(&sent).unwrap();
            let got: Vec<u8> = (0..200).map(|_| wait_byte(&*registers)).collect();
            assert_eq!(got, sent);
            registers.write(DATA, b"y");
            let mut answer = [0];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"y");
        }
        assert!(line.0.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_pty_has_a_path_and_carries_bytes() {
        let terminal = Terminal::pty().unwrap();
        let path = terminal.pty_path().unwrap().to_owned();
        let serial = Serial::new(
            terminal,
            Arc::new(Count::default()),
            &ThreadSpawner::unconfined(),
        )
        .unwrap();
        let registers = serial.registers();
        let mut other = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        other.write_all(b"q").unwrap();
        assert_eq!(wait_byte(&*registers), b'q');
        registers.write(DATA, b"z");
        let mut answer = [0];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"z");
    }

    #[test]
    fn a_path_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            Terminal::socket(&path),
            Err(crate::terminal::TerminalError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
