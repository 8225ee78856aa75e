//! openraft's own test suite for log stores, run on ours. Its state machine is a plain one in
//! memory: the suite checks how the two behave together at start, not what ours applies.
