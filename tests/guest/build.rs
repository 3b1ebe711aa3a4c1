//! Hands the linker the guest's layout. The compiler's own flags (code model,
//! relocation model) cannot be set from here; `build.sh` sets them.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    println!("cargo:rerun-if-changed=src/trap.s");
    for arg in [
        "-nostdlib".to_owned(),
        "-nostartfiles".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        format!("-Wl,-T,{dir}/link.ld"),
        // One read-write-execute segment is meant: the guest has no loader.
        "-Wl,--build-id=none,-z,noexecstack,-z,max-page-size=4096,--no-warn-rwx-segments"
            .to_owned(),
    ] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
}
