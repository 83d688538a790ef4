//! The CPU budget of one run of the vCPU, and how a run is interrupted.
//!
//! A timer on the thread's CPU clock sends this thread a signal when the budget
//! is used up, and again every few milliseconds, because a signal that arrives
//! just before the vCPU is entered would be lost; its handler also tells KVM to
//! leave at once.
#![allow(unsafe_code)]

use crate::sandbox::error::SandboxError;
use kvm_bindings::kvm_run;
use nix::errno::Errno;
use nix::sys::signal::sigaction;
use nix::sys::signal::{SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;
use std::cell::{Cell, RefCell};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::time::Duration;

/// Ignored by default, so that one which arrives late harms nobody.
const SIGNAL: Signal = Signal::SIGURG;

/// Time between two signals once the budget is used up.
const REPEAT: Duration = Duration::from_millis(5);

thread_local! {
    /// What makes the vCPU that this thread is running leave at once, for the
    /// signal handler.
    static LEAVE: Cell<*mut u8> = const { Cell::new(null_mut()) };
    /// This thread's timer, made at its first run.
    static TIMER: RefCell<Option<Timer>> = const { RefCell::new(None) };
}

/// The budget of a run that is under way on this thread.
pub(super) struct Budget {
    budget: Duration,
    end: Duration,
}

impl Budget {
    /// Starts the clock.
    pub(super) fn start(budget: Duration, run: &mut kvm_run) -> Result<Self, SandboxError> {
        install_handler()?;
        run.immediate_exit = 0;
        LEAVE.set(&raw mut run.immediate_exit);
        let started = Self {
            budget,
            end: cpu_time()? + budget,
        };
        arm(budget).map_err(|errno| SandboxError::Host("set a timer", errno))?;
        Ok(started)
    }

    /// Whether there is time left.
    pub(super) fn check(&self) -> Result<(), SandboxError> {
        if cpu_time()? < self.end {
            Ok(())
        } else {
            Err(SandboxError::CpuBudget(self.budget))
        }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        TIMER.with_borrow_mut(|timer| {
            if let Some(timer) = timer {
                // A timer that cannot be stopped sends signals that do nothing.
                timer
                    .set(
                        Expiration::OneShot(Duration::ZERO.into()),
                        TimerSetTimeFlags::empty(),
                    )
                    .ok();
            }
        });
        LEAVE.set(null_mut());
    }
}

/// Sets this thread's timer; makes it first where there is none, or where it
/// stayed behind in the parent of this process.
fn arm(budget: Duration) -> Result<(), Errno> {
    let first = budget.max(Duration::from_nanos(1));
    let expiration = Expiration::IntervalDelayed(first.into(), REPEAT.into());
    TIMER.with_borrow_mut(|slot| {
        if let Some(timer) = slot
            && timer.set(expiration, TimerSetTimeFlags::empty()).is_ok()
        {
            return Ok(());
        }
        // Whatever signals the caller has blocked on its threads.
        let mut ours = SigSet::empty();
        ours.add(SIGNAL);
        ours.thread_unblock()?;
        let event = SigEvent::new(SigevNotify::SigevThreadId {
            signal: SIGNAL,
            thread_id: gettid().as_raw(),
            si_value: 0,
        });
        let mut timer = Timer::new(ClockId::CLOCK_THREAD_CPUTIME_ID, event)?;
        timer.set(expiration, TimerSetTimeFlags::empty())?;
        *slot = Some(timer);
        Ok(())
    })
}

fn cpu_time() -> Result<Duration, SandboxError> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .map_err(|errno| SandboxError::Host("read the CPU clock", errno))
}

/// Installs the signal handler, once in the life of the process. It interrupts
/// `KVM_RUN`, so it must not restart system calls.
fn install_handler() -> Result<(), SandboxError> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            let action = SigAction::new(
                SigHandler::Handler(leave_guest),
                SaFlags::empty(),
                SigSet::empty(),
            );
            // SAFETY: the handler reads a thread-local without destructor and
            // writes one byte; both are safe wherever it interrupts.
            unsafe { sigaction(SIGNAL, &action) }.map(|_| ())
        })
        .map_err(|errno| SandboxError::Host("install a signal handler", errno))
}

extern "C" fn leave_guest(_: libc::c_int) {
    let leave = LEAVE.get();
    if !leave.is_null() {
        // SAFETY: `Budget` sets the pointer to a byte of the vCPU's shared page
        // before a run on this thread and clears it after; the page outlives
        // the run.
        unsafe { leave.write_volatile(1) };
    }
}
