//! What a background I/O error does to the job: `--on-source-error` and `--on-target-error`.

/// The user's choice, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The job ends with the error.
    Report,
    /// The job goes on: an unreadable source range becomes zeroes, an unwritable target range is skipped.
    Ignore,
    /// Stop when the target is full, else report.
    Enospc,
    /// The job pauses until it is resumed, then tries the same range again.
    Stop,
}

/// What to do about one error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// End the job.
    Report,
    /// Go on without the range.
    Ignore,
    /// Pause, then try again.
    Stop,
}

impl Action {
    /// As QEMU's events and our JSON name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

impl OnError {
    /// The action for an error; `no_space`: it was ENOSPC.
    pub fn action(self, no_space: bool) -> Action {
        match self {
            Self::Report => Action::Report,
            Self::Ignore => Action::Ignore,
            Self::Enospc if no_space => Action::Stop,
            Self::Enospc => Action::Report,
            Self::Stop => Action::Stop,
        }
    }

    /// Where nobody can resume the job any more.
    pub fn without_stop(self) -> Self {
        match self {
            Self::Stop | Self::Enospc => Self::Report,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_have_the_names_that_events_have() {
        assert_eq!([Action::Report, Action::Ignore, Action::Stop].map(Action::name), ["report", "ignore", "stop"]);
    }

    #[test]
    fn without_stop_everything_but_ignore_reports() {
        for (policy, action) in
            [(OnError::Ignore, Action::Ignore), (OnError::Stop, Action::Report), (OnError::Enospc, Action::Report)]
        {
            assert_eq!(policy.without_stop().action(true), action);
        }
    }

    #[test]
    fn enospc_stops_for_a_full_target_only() {
        assert_eq!(OnError::Enospc.action(true), Action::Stop);
        assert_eq!(OnError::Enospc.action(false), Action::Report);
        for no_space in [false, true] {
            assert_eq!(OnError::Report.action(no_space), Action::Report);
            assert_eq!(OnError::Ignore.action(no_space), Action::Ignore);
            assert_eq!(OnError::Stop.action(no_space), Action::Stop);
            for policy in [OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop] {
                assert_ne!(policy.without_stop().action(no_space), Action::Stop);
            }
        }
    }
}
