//! Mounting without a helper program, and unmounting whatever happens.

use std::ffi::{CString, OsString};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{getegid, geteuid};

/// What the kernel calls these file systems.
const KIND: &str = "fuse.disk";

/// Mounts an empty connection, to be served by who reads from the descriptor. No child process inherits it,
/// so the connection ends with this process. The source of the mount, as others see it, says who serves it.
///
/// # Errors
/// If this process may not mount, or there is no `/dev/fuse`.
pub fn connect(mountpoint: &Path) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let (pid, started) = (std::process::id(), started("self")?);
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
        device.as_raw_fd(),
        geteuid().as_raw(),
        getegid().as_raw()
    );
    let options = CString::new(options)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount(format!("disk:{pid}:{started}"), mountpoint, KIND, flags, options.as_c_str())?;
    Ok(device.into())
}

/// Ends the connection and unmounts, although processes may have files open there: whatever they do with them
/// fails from then on.
///
/// # Errors
/// If nothing is mounted there.
pub fn disconnect(mountpoint: &Path) -> io::Result<()> {
    Ok(unmount(mountpoint, UnmountFlags::FORCE | UnmountFlags::DETACH)?)
}

/// Unmounts the disks in a folder whose processes have died, and says how many that were. By hand, that is
/// `umount -fl`; `fusermount3 -uz` also does. Who looks into such a folder before that is told
/// `Transport endpoint is not connected`.
///
/// It looks only at the mounts that the calling process sees. A disk that a living process serves stays.
///
/// # Errors
/// If `/proc` cannot be read, or the caller may not unmount.
pub fn cleanup(folder: &Path) -> io::Result<usize> {
    // The folder itself may be one of those that nobody serves, and then it cannot be resolved.
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let stale: Vec<PathBuf> =
        mounts.lines().filter_map(stale).filter(|path| path.starts_with(&folder)).collect();
    // What was mounted last is in front of the others.
    for mountpoint in stale.iter().rev() {
        disconnect(mountpoint)?;
    }
    Ok(stale.len())
}

/// Where a disk is mounted that nobody serves, if a line of `mountinfo` is about one.
fn stale(line: &str) -> Option<PathBuf> {
    let (mount, source) = line.split_once(" - ")?;
    let mut source = source.split(' ');
    if source.next()? != KIND {
        return None;
    }
    let (pid, began) = source.next()?.strip_prefix("disk:")?.split_once(':')?;
    let alive = started(pid).is_ok_and(|now| now.to_string() == began);
    (!alive).then(|| unescape(mount.split(' ').nth(4).unwrap_or_default()))
}

/// When a process started, in ticks since the boot: with its number, that is who it is.
///
/// # Errors
/// If there is none. One that has been killed counts as gone, even if a thread of it cannot end because it
/// waits for a disk that the process itself serves.
fn started(pid: &str) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything, but it ends at the last parenthesis.
    let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    match fields.next() {
        Some("Z" | "X") | None => Err(io::ErrorKind::NotFound.into()),
        Some(_) => {
            fields.nth(18).and_then(|ticks| ticks.parse().ok()).ok_or(io::ErrorKind::InvalidData.into())
        }
    }
}

/// `mountinfo` writes blanks and the like as a backslash and three octal digits.
fn unescape(path: &str) -> PathBuf {
    let mut bytes = path.bytes();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => bytes.by_ref().take(3).fold(0_u8, |byte, digit| (byte << 3) | (digit & 7)),
            byte => byte,
        });
    }
    OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::{started, unescape};

    #[test]
    fn blanks_and_backslashes_of_a_mount_point_are_understood() {
        assert_eq!(unescape("/tmp/a\\040b\\134c").to_str(), Some("/tmp/a b\\c"));
    }

    #[test]
    fn a_process_has_started_and_one_that_is_not_there_has_not() {
        assert!(started("self").expect("this one") > 0);
        assert!(started("4194305").is_err(), "no process has such a number");
    }
}
