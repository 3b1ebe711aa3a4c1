//! Stock Linux guests, as the lab's tests start them.
//!
//! Kernels and initramfs are what `scripts/test-lab` has put into `FERRY_LAB_DIR`:
//! `NAME.bzimage`, `NAME.vmlinux` and `NAME.initramfs` for each kernel, and `guest_net`, the
//! checker, which is also inside each guest.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ferry::Ferry;
use crate::process::wait_for;
use crate::shell::{ConsoleClosed, Shell};

/// How long a guest may take to boot: the lab's CPU is emulated and slow.
pub const BOOT: Duration = Duration::from_secs(90);

/// Whether `test` can run here; says why not.
pub fn in_lab(test: &str) -> bool {
    let here = std::env::var_os("FERRY_LAB").is_some();
    if !here {
        println!("SKIP: {test}: not in the lab (run scripts/test-lab)");
    }
    here
}

/// A file of the lab's tests.
///
/// # Errors
/// When `FERRY_LAB_DIR` does not say where they are.
pub fn lab_file(name: &str) -> Result<PathBuf> {
    let dir = std::env::var_os("FERRY_LAB_DIR")
        .context("FERRY_LAB_DIR is not set: run the lab's tests by scripts/test-lab")?;
    Ok(Path::new(&dir).join(name))
}

/// A distribution's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// Debian 12's own, for clouds.
    Cloud6_1,
    /// Debian 12's backported one, for clouds.
    Cloud6_12,
    /// The same for any machine, with drivers of real hardware.
    Full6_12,
}

impl Kernel {
    /// What its files are called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cloud6_1 => "6.1-cloud",
            Self::Cloud6_12 => "6.12-cloud",
            Self::Full6_12 => "6.12",
        }
    }

    /// What its `uname -r` begins with.
    pub const fn release(self) -> &'static str {
        match self {
            Self::Cloud6_1 => "6.1.",
            Self::Cloud6_12 | Self::Full6_12 => "6.12.",
        }
    }
}

/// In what form a kernel is loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// By the Linux boot protocol.
    BzImage,
    /// By PVH.
    Vmlinux,
}

impl Format {
    const fn extension(self) -> &'static str {
        match self {
            Self::BzImage => "bzimage",
            Self::Vmlinux => "vmlinux",
        }
    }
}

/// A guest to be.
#[derive(Clone, Debug)]
pub struct LinuxConfig {
    /// Its kernel.
    pub kernel: Kernel,
    /// In what form.
    pub format: Format,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// Whether it is made of huge pages of the host.
    pub huge_pages: bool,
    /// What its kernel is told besides.
    pub cmdline: &'static str,
    /// More options of `ferry`.
    pub options: Vec<String>,
}

impl LinuxConfig {
    /// A guest with one vCPU and 192 MiB that is booted from a bzImage.
    pub const fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            format: Format::BzImage,
            vcpus: 1,
            memory_mib: 192,
            huge_pages: false,
            cmdline: "",
            options: Vec::new(),
        }
    }

    /// With so many vCPUs.
    #[must_use]
    pub const fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// With so much memory.
    #[must_use]
    pub const fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With memory made of huge pages, which the host must have.
    #[must_use]
    pub const fn huge_pages(mut self) -> Self {
        self.huge_pages = true;
        self
    }

    /// Its kernel told this as well.
    #[must_use]
    pub const fn cmdline(mut self, cmdline: &'static str) -> Self {
        self.cmdline = cmdline;
        self
    }

    /// Loaded in this form.
    #[must_use]
    pub const fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// With more options of `ferry`, such as `["--net", "tap=t0"]`.
    #[must_use]
    pub fn options(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(ToString::to_string));
        self
    }

    fn arguments(&self, dir: &Path, name: &str) -> Result<Vec<String>> {
        let file = |extension: &str| {
            let path = lab_file(&format!("{}.{extension}", self.kernel.name()))?;
            Ok::<_, anyhow::Error>(path.display().to_string())
        };
        let huge_pages = if self.huge_pages { "on" } else { "off" };
        let mut arguments = vec![
            "--kernel".to_owned(),
            file(self.format.extension())?,
            "--initramfs".to_owned(),
            file("initramfs")?,
            "--cmdline".to_owned(),
            format!("console=ttyS0 quiet panic=-1 {}", self.cmdline),
            "--cpus".to_owned(),
            format!("boot={}", self.vcpus),
            "--memory".to_owned(),
            format!("size={}M,shared=on,hugepages={huge_pages}", self.memory_mib),
            "--serial".to_owned(),
            "tty".to_owned(),
            "--console".to_owned(),
            format!("socket={}", console_path(dir, name).display()),
        ];
        arguments.extend(self.options.iter().cloned());
        Ok(arguments)
    }
}

/// The console socket of the VM of the process `name`.
pub fn console_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.console"))
}

/// A running Linux guest.
#[derive(Debug)]
pub struct Linux {
    /// The process it runs in.
    pub ferry: Ferry,
    /// Commands in it.
    pub shell: Shell,
    kernel: Kernel,
    boots: usize,
    /// It came to its process from another.
    moved: bool,
}

/// Waits until a guest that starts for the `boots`-th time in this process serves commands.
fn await_boot(ferry: &mut Ferry, console: &Path, kernel: Kernel, boots: usize) -> Result<Shell> {
    let mut shell = Shell::attach(console, Duration::from_secs(10))?;
    let line = wait_for("GUEST-INIT from the guest", BOOT, || {
        let serial = ferry.serial();
        let mut lines = serial
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n') && line.contains("GUEST-INIT"));
        let line = lines.nth(boots - 1).map(str::to_owned);
        ferry.process.check()?;
        Ok(line)
    });
    let line = line.with_context(|| ferry.last_words())?;
    ensure!(line.contains(kernel.release()), "another kernel: {line}");
    let greeted = shell.greet(Duration::from_secs(30));
    greeted.with_context(|| ferry.last_words())?;
    Ok(shell)
}

impl Linux {
    /// Boots a guest in a `ferry` called `name` with its files in `dir`, and waits until it serves
    /// commands.
    ///
    /// # Errors
    /// When it does not; its last words are in the error.
    pub fn boot(dir: &Path, name: &str, config: &LinuxConfig) -> Result<Self> {
        let arguments = config.arguments(dir, name)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let start = Instant::now();
        let mut ferry = Ferry::start(dir, name, &arguments)?;
        let shell = await_boot(&mut ferry, &console_path(dir, name), config.kernel, 1)?;
        let (all, api) = (start.elapsed(), ferry.start_time);
        println!("{name} serves commands after {all:.1?}, its API after {api:.1?}");
        Ok(Self {
            ferry,
            shell,
            kernel: config.kernel,
            boots: 1,
            moved: false,
        })
    }

    /// Reboots the guest from inside, and waits until it serves commands again.
    ///
    /// # Errors
    /// When it does not; its last words are in the error.
    pub fn reboot(&mut self, dir: &Path) -> Result<()> {
        self.shell.send("reboot -f")?;
        // The VMM closes the console with the old machine.
        wait_for("the end of the old machine", BOOT, || {
            let answer = self.shell.run("true", Duration::from_secs(1));
            Ok(answer
                .is_err_and(|error| error.is::<ConsoleClosed>())
                .then_some(()))
        })
        .with_context(|| self.ferry.last_words())?;
        self.boots += 1;
        let console = console_path(dir, self.ferry.name());
        self.shell = await_boot(&mut self.ferry, &console, self.kernel, self.boots)?;
        Ok(())
    }

    /// Gives the interface with the MAC address `mac` these addresses (`10.0.0.2/24`), and brings
    /// it up; its name.
    ///
    /// # Errors
    /// When there is none or it cannot be.
    pub fn add_interface(&mut self, mac: &str, addresses: &[&str]) -> Result<String> {
        let name = self
            .shell
            .ask(&format!("cd /sys/class/net && grep -l {mac} */address"))
            .context("the guest has no such interface")?;
        let name = name.trim().trim_end_matches("/address").to_owned();
        let mut commands = vec![
            // The address is ours alone; to look for others that have it takes a second.
            format!("echo 0 > /proc/sys/net/ipv6/conf/{name}/accept_dad"),
            format!("ip link set {name} up"),
        ];
        for address in addresses {
            commands.push(format!("ip addr add {address} dev {name}"));
        }
        self.shell.ask(&commands.join(" && "))?;
        Ok(name)
    }

    /// The guest has gone to `destination`, whose files are in `dir`: speaks to it there. Gives
    /// the process it left.
    ///
    /// # Errors
    /// When it does not answer there.
    pub fn follow(&mut self, dir: &Path, destination: Ferry) -> Result<Ferry> {
        let left = std::mem::replace(&mut self.ferry, destination);
        let console = console_path(dir, self.ferry.name());
        let followed = self.shell.follow(&console, Duration::from_secs(120));
        followed.with_context(|| self.ferry.last_words())?;
        self.moved = true;
        Ok(left)
    }

    /// Switches the guest off from inside and waits for the end of `ferry`, which must be clean. The
    /// process that booted the guest ends with it; one that the guest came to is ended here.
    ///
    /// # Errors
    /// When either fails.
    pub fn power_off(mut self) -> Result<()> {
        self.shell.send("exit 0")?;
        if self.moved {
            self.ferry.wait_event("shutdown", Duration::from_secs(60))?;
            let said = self.ferry.serial();
            ensure!(said.contains("GUEST-EXIT 0"), "no clean end: {said}");
            return self.ferry.shut_down();
        }
        let status = self
            .ferry
            .process
            .wait(Duration::from_secs(60))
            .with_context(|| self.ferry.last_words())?;
        ensure!(
            status.success(),
            "ferry ended with {status}:\n{}",
            self.ferry.last_words()
        );
        ensure!(self.ferry.serial().contains("GUEST-EXIT 0"), "no clean end");
        Ok(())
    }
}

/// Waits until the guest answers at `address` (a TCP connection is taken or refused).
///
/// # Errors
/// When it does not within `limit`.
pub fn wait_reachable(address: IpAddr, limit: Duration) -> Result<()> {
    wait_for(&format!("an answer from {address}"), limit, || {
        let connected =
            std::net::TcpStream::connect_timeout(&(address, 9).into(), Duration::from_secs(1));
        Ok(match connected {
            Ok(_) => Some(()),
            Err(error) => (error.kind() == std::io::ErrorKind::ConnectionRefused).then_some(()),
        })
    })
}
