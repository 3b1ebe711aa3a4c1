//! Both sides in one process: a fake guest that writes its memory, fake devices with state, and a
//! relay between the two that cuts, corrupts or stalls.

mod devices;
mod fakes;
mod faults;
mod good;
mod hostile;
mod relay;
mod rig;
