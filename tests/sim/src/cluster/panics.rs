//! Panics of the simulating process, of any thread and any task. A task that panics ends without a word:
//! its runtime keeps the panic for whoever waits for the task, and nobody waits for most of them. This
//! module only remembers the first one; what it means is judged by the driver.

use parking_lot::Mutex;

static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// Remembers panics from now on, beside what is done about them anyway.
pub(super) fn watch() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        FIRST.lock().get_or_insert_with(|| panic.to_string().replace('\n', " "));
        usual(panic);
    }));
}

/// Where and why something panicked first.
pub(super) fn first() -> Option<String> {
    FIRST.lock().clone()
}
