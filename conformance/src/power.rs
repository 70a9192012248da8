//! Power cuts (law D3). A kill never tests whether anything was synced to disk: what the process had
//! written is still in the operating system's memory, and survives it. So a server's data lies on a
//! file system inside an image file, and the cut is a copy of that image taken while the server stands
//! still: what the file system had not yet been made to write is not in it, as it would not be on a
//! disk. It needs root and loop devices.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::harness::Unavailable;

/// Large enough for RabbitMQ, and sparse: it takes the space that is used.
const IMAGE_BYTES: u64 = 1 << 30;

/// A file system of its own, whose power can be cut. It is unmounted when it is dropped.
#[derive(Debug)]
pub struct Disk {
    directory: TempDir,
    cuts: u32,
}

impl Disk {
    /// Makes and mounts one.
    ///
    /// # Errors
    /// [`Unavailable`] with the reason, where the machine does not let us.
    pub fn new() -> Result<Self, Unavailable> {
        let disk = Self {
            directory: TempDir::with_prefix("wilco-power-").map_err(because)?,
            cuts: 0,
        };
        fs::create_dir(disk.path()).map_err(because)?;
        let image = File::create(disk.image()).map_err(because)?;
        image.set_len(IMAGE_BYTES).map_err(because)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(disk.image()))?;
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted: the same place over all cuts.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Cuts the power: what was on the disk at this moment is all that there is from now on.
    ///
    /// `stop` makes whoever writes to it stand still, `kill` ends them; the disk cannot be changed
    /// over under an open file.
    ///
    /// # Errors
    /// [`Unavailable`], and then nothing is known of what is on it.
    pub async fn cut(
        &mut self,
        stop: impl FnOnce() -> Result<(), Unavailable>,
        kill: impl AsyncFnOnce() -> Result<(), Unavailable>,
    ) -> Result<(), Unavailable> {
        stop()?;
        let before = self.image();
        self.cuts += 1;
        let after = self.image();
        let copied = run(Command::new("cp")
            .arg("--sparse=always")
            .args([&before, &after]));
        kill().await?;
        copied?;
        self.unmount()?;
        fs::remove_file(before).map_err(because)?;
        self.mount()
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join(format!("image-{}", self.cuts))
    }

    fn mount(&self) -> Result<(), Unavailable> {
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(self.image())
            .arg(self.path()))
    }

    fn unmount(&self) -> Result<(), Unavailable> {
        run(Command::new("umount").arg(self.path()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a server that is still being ended must not keep the mount for ever.
        let _ = run(Command::new("umount").arg("-l").arg(self.path()));
    }
}

fn run(command: &mut Command) -> Result<(), Unavailable> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Unavailable::because(format!("{program}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let told = String::from_utf8_lossy(&output.stderr);
    Err(Unavailable::because(format!("{program}: {}", told.trim())))
}

fn because(error: io::Error) -> Unavailable {
    Unavailable::because(error.to_string())
}
