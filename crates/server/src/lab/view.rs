//! What a lab looks like at one moment, free of handles, and its form as a table of text or JSON.
//! The live view draws the same columns (`screen`).

use serde::Serialize;

use super::fsync::FsyncTimes;

/// One moment of a lab.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct View {
    /// The lab's folder.
    pub(crate) dir: String,
    /// Certificates everywhere.
    pub(crate) tls: bool,
    /// Who leads: a member that answers and calls itself the leader, in the highest term if two do.
    pub(crate) leader: Option<String>,
    /// Its term.
    pub(crate) term: u64,
    /// The members, by number.
    pub(crate) members: Vec<Row>,
}

/// One member at that moment. Numbers of a member that does not answer are its last ones.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Row {
    /// Number within the lab.
    pub(crate) number: u16,
    /// Its name.
    pub(crate) name: String,
    /// Its id in the cluster, in hexadecimal.
    pub(crate) id: Option<String>,
    /// Where clients reach it.
    pub(crate) client_url: String,
    /// Its process.
    pub(crate) pid: Option<u32>,
    /// One or a few words: running, starting, silent, isolated, paused, stopping, killed ...
    pub(crate) state: String,
    /// It answered within the last two seconds.
    pub(crate) answers: bool,
    /// Its peer traffic is cut.
    pub(crate) isolated: bool,
    /// leader, follower, learner, or no leader; nothing when it does not answer.
    pub(crate) role: Option<&'static str>,
    /// Its term.
    pub(crate) term: Option<u64>,
    /// Whom it follows.
    pub(crate) leader: Option<String>,
    /// Revision of its data.
    pub(crate) revision: Option<i64>,
    /// Last entry it knows as agreed.
    pub(crate) raft_index: Option<u64>,
    /// Last entry it applied.
    pub(crate) applied_index: Option<u64>,
    /// Entries between the highest index that any answering member knows and its applied index.
    pub(crate) lag: Option<u64>,
    /// Size of its database. Unit: bytes.
    pub(crate) db_bytes: Option<i64>,
    /// Memory of its process. Unit: bytes.
    pub(crate) resident_bytes: Option<u64>,
    /// Mean time of a log sync in the latest second with any. Unit: seconds.
    pub(crate) fsync_last_seconds: Option<f64>,
    /// Bound on 99 of 100 log syncs of the last half minute. Unit: seconds.
    pub(crate) fsync_p99_seconds: Option<f64>,
}

/// One column of the table.
pub(crate) struct Column {
    /// Its heading.
    pub(crate) title: &'static str,
    /// Where it is narrow, columns of higher rank go first.
    pub(crate) rank: u8,
    /// Numbers stand right.
    pub(crate) right: bool,
    /// One cell per member.
    pub(crate) cells: Vec<String>,
}

impl Row {
    /// Takes over the times of log syncs.
    pub(crate) fn set_fsync(&mut self, times: FsyncTimes) {
        self.fsync_last_seconds = times.last_seconds;
        self.fsync_p99_seconds = times.p99_seconds;
    }
}

impl View {
    /// The table's columns, in order.
    pub(crate) fn columns(&self) -> Vec<Column> {
        let column = |title, rank, right, cell: fn(&Row) -> String| Column {
            title,
            rank,
            right,
            cells: self.members.iter().map(cell).collect(),
        };
        vec![
            column("MEMBER", 0, false, |row| row.name.clone()),
            column("PID", 5, true, |row| number(row.pid)),
            column("STATE", 0, false, |row| row.state.clone()),
            column("ROLE", 0, false, |row| row.role.unwrap_or("-").to_owned()),
            column("TERM", 0, true, |row| number(row.term)),
            column("LEADER", 1, false, |row| row.leader.clone().unwrap_or_else(none)),
            column("REVISION", 0, true, |row| number(row.revision)),
            column("RAFT", 7, true, |row| number(row.raft_index)),
            column("APPLIED", 6, true, |row| number(row.applied_index)),
            column("LAG", 0, true, |row| number(row.lag)),
            column("FSYNC", 2, true, |row| seconds(row.fsync_last_seconds)),
            column("P99", 1, true, |row| bound(row.fsync_p99_seconds)),
            column("DB", 3, true, |row| bytes(row.db_bytes.and_then(|n| u64::try_from(n).ok()))),
            column("RSS", 4, true, |row| bytes(row.resident_bytes)),
        ]
    }

    /// One line on the whole: who leads and how many members serve.
    pub(crate) fn summary(&self) -> String {
        let serving = self.members.iter().filter(|row| row.answers && row.role != NO_LEADER);
        let leader = match &self.leader {
            Some(leader) => format!("{leader} leads in term {}", self.term),
            None => "no leader".to_owned(),
        };
        format!("{leader}; {} of {} members serve", serving.count(), self.members.len())
    }

    /// The table as text, as wide as it needs to be.
    pub(crate) fn text(&self) -> String {
        let columns = self.columns();
        let widths: Vec<usize> = columns.iter().map(Column::width).collect();
        let line = |cells: Vec<&str>| {
            let padded = cells.iter().zip(&columns).zip(&widths).map(|((cell, column), width)| {
                if column.right { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        let mut lines = vec![line(columns.iter().map(|column| column.title).collect())];
        for index in 0..self.members.len() {
            lines.push(line(columns.iter().map(|column| column.cells[index].as_str()).collect()));
        }
        lines.push(self.summary());
        lines.join("\n")
    }

    /// All of it as JSON.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain fields are always JSON")
    }
}

/// Role of a member that answers but knows no leader.
pub(crate) const NO_LEADER: Option<&str> = Some("no leader");

impl Column {
    /// Characters of its widest cell.
    pub(crate) fn width(&self) -> usize {
        let cells = self.cells.iter().map(String::as_str);
        cells.chain([self.title]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    }
}

fn none() -> String {
    "-".to_owned()
}

fn number(value: Option<impl ToString>) -> String {
    value.map_or_else(none, |value| value.to_string())
}

fn bytes(value: Option<u64>) -> String {
    let Some(value) = value else { return none() };
    let mut size = value as f64;
    for unit in ["B", "KiB", "MiB"] {
        if size < 1024.0 {
            let digits = usize::from(unit != "B" && size < 10.0);
            return format!("{size:.digits$} {unit}");
        }
        size /= 1024.0;
    }
    format!("{size:.1} GiB")
}

fn seconds(value: Option<f64>) -> String {
    let Some(value) = value else { return none() };
    if value >= 1.0 { format!("{value:.1} s") } else { format!("{:.1} ms", value * 1000.0) }
}

/// A bound that a histogram gave; above its last bucket nothing is known.
fn bound(value: Option<f64>) -> String {
    match value {
        None => none(),
        Some(value) if value.is_infinite() => "> 8 s".to_owned(),
        Some(value) if value >= 1.0 => format!("< {value:.0} s"),
        Some(value) => format!("< {:.0} ms", value * 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up_and_leaves_unknown_things_open() {
        let running = Row {
            number: 1,
            name: "m1".into(),
            pid: Some(4711),
            state: "running".into(),
            answers: true,
            role: Some("leader"),
            term: Some(2),
            leader: Some("m1".into()),
            revision: Some(17),
            lag: Some(0),
            db_bytes: Some(20_480),
            resident_bytes: Some(31 << 20),
            fsync_last_seconds: Some(0.0012),
            fsync_p99_seconds: Some(0.004),
            ..Row::default()
        };
        let dead = Row { number: 2, name: "m2".into(), state: "killed".into(), ..Row::default() };
        let view = View {
            leader: Some("m1".into()),
            term: 2,
            members: vec![running, dead],
            ..View::default()
        };
        let text = view.text();
        let lines: Vec<&str> = text.lines().collect();
        for (title, cell) in [("STATE", "running"), ("ROLE", "leader"), ("LEADER", "m1")] {
            assert_eq!(lines[0].find(title), lines[1].rfind(cell), "{title}\n{text}");
        }
        for part in ["4711", "1.2 ms", "< 4 ms", "20 KiB", "31 MiB"] {
            assert!(lines[1].contains(part), "{part}\n{text}");
        }
        assert!(lines[2].starts_with("m2") && lines[2].contains("killed"), "{text}");
        assert_eq!(lines[3], "m1 leads in term 2; 1 of 2 members serve");
        let json: serde_json::Value = serde_json::from_str(&view.json()).expect("JSON");
        assert_eq!(json["members"][0]["revision"], 17);
        assert!(json["members"][1]["pid"].is_null());
    }
}
