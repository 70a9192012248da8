//! Every case of the workflow (W1 to W40, F7) on every broker that processes can share.

mod common;

use wilco_conformance::{cases, for_each_case, harnesses};

macro_rules! tests {
    ($($module:ident :: $name:ident, $case:literal, $title:literal;)*) => {
        $(common::check!($name);)*

        #[test]
        fn every_case_is_a_test() {
            let tests = [$(stringify!($name)),*];
            let all: Vec<_> = cases::all().iter().map(|case| case.name).collect();
            assert_eq!(all, tests);
            assert!(NOT_RUN.iter().all(|name| all.contains(name)), "a name that is no case");
        }
    };
}

mod embedded {
    use super::*;

    const HARNESS: harnesses::Sqlite = harnesses::Sqlite;
    /// It is a file: it has no process, no network, and asks nobody who he is.
    const NOT_RUN: &[&str] = &[
        "w4_a_guest_that_the_broker_refuses_says_so",
        "w18_a_broker_that_is_down_at_the_start_is_told",
        "w19_a_lost_confirm_leads_to_one_effect",
        "w20_a_failover_confirms_nothing_false",
        "w33_an_alarm_is_waited_out",
        "w39_a_crowd_that_comes_back_is_bounded",
    ];
    for_each_case!(tests);
}

mod redis {
    use super::*;

    const HARNESS: harnesses::Redis = harnesses::Redis;
    const NOT_RUN: &[&str] = &[];
    for_each_case!(tests);
}

mod nats {
    use super::*;

    const HARNESS: harnesses::Nats = harnesses::Nats;
    const NOT_RUN: &[&str] = &[];
    for_each_case!(tests);
}

mod rabbitmq {
    use super::*;

    const HARNESS: harnesses::RabbitMq = harnesses::RabbitMq;
    /// It is one node.
    const NOT_RUN: &[&str] = &["w20_a_failover_confirms_nothing_false"];
    for_each_case!(tests);
}
