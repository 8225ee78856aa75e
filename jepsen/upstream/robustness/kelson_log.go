// The one function of etcd's robustness suite that reads etcd's own files, for Kelson: the requests
// that the members' logs hold, in order, as `kelson log --json` shows them. It goes into
// tests/robustness/report/ of a checkout of etcd, where the original is renamed (see README.md).

package report

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"

	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/tests/v3/framework/e2e"
	"go.etcd.io/etcd/tests/v3/robustness/model"
	"go.etcd.io/raft/v3/raftpb"
)

// One line of `kelson log --json`.
type logLine struct {
	Kind     string
	Index    uint64
	Term     uint64
	Commands []logCommand
}

type logCommand struct {
	Op      string
	Request string
}

// The entries that one member's files hold: those in force, by index.
type memberLog struct {
	entries map[uint64]logLine
	last    uint64
}

// PersistedRequests gives every request that the members agreed on, from the first entry on.
func PersistedRequests(lg *zap.Logger, dataDirs []string) ([]model.EtcdRequest, error) {
	var logs []memberLog
	for _, dir := range dataDirs {
		log, err := readMemberLog(dir)
		if err != nil {
			return nil, fmt.Errorf("log in %s: %w", dir, err)
		}
		logs = append(logs, log)
	}
	entries, err := mergeLogs(logs)
	if err != nil {
		return nil, err
	}
	var requests []model.EtcdRequest
	for _, entry := range entries {
		for _, command := range entry.Commands {
			request, err := asRequest(command)
			if err != nil {
				return nil, fmt.Errorf("entry %d: %w", entry.Index, err)
			}
			if request != nil {
				requests = append(requests, *request)
			}
		}
	}
	lg.Info("Read the members' logs", zap.Int("entries", len(entries)), zap.Int("requests", len(requests)))
	return requests, nil
}

func readMemberLog(dataDir string) (memberLog, error) {
	output, err := exec.Command(e2e.BinPath.Etcd, "log", "--json", dataDir).Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			return memberLog{}, fmt.Errorf("%w: %s", err, failed.Stderr)
		}
		return memberLog{}, err
	}
	log := memberLog{entries: map[uint64]logLine{}}
	lines := bufio.NewScanner(bytes.NewReader(output))
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var line logLine
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return memberLog{}, err
		}
		switch line.Kind {
		case "commands", "blank", "membership":
			log.entries[line.Index] = line
			log.last = line.Index
		case "truncated-after":
			for ; log.last > line.Index; log.last-- {
				delete(log.entries, log.last)
			}
		}
	}
	return log, lines.Err()
}

// The log that ends with the highest term, then index, holds everything that was acknowledged. What
// it no longer has was committed long ago, so any other member's entry will do there.
func mergeLogs(logs []memberLog) ([]logLine, error) {
	var newest *memberLog
	for i := range logs {
		log := &logs[i]
		if newest == nil || after(log.entries[log.last], newest.entries[newest.last]) {
			newest = log
		}
	}
	if newest == nil || newest.last == 0 {
		return nil, errors.New("no entry in any log")
	}
	var merged []logLine
	for index := uint64(1); index <= newest.last; index++ {
		entry, found := newest.entries[index]
		for i := 0; i < len(logs) && !found; i++ {
			entry, found = logs[i].entries[index]
		}
		if !found {
			return nil, fmt.Errorf("no log holds entry %d", index)
		}
		merged = append(merged, entry)
	}
	return merged, nil
}

func after(a, b logLine) bool {
	if a.Term != b.Term {
		return a.Term > b.Term
	}
	return a.Index > b.Index
}

// Wraps a request as etcd's log would hold it, and lets the suite read that.
func asRequest(command logCommand) (*model.EtcdRequest, error) {
	data, err := base64.StdEncoding.DecodeString(command.Request)
	if err != nil {
		return nil, err
	}
	var wrapped pb.InternalRaftRequest
	var request proto.Message
	switch command.Op {
	case "put":
		wrapped.Put = &pb.PutRequest{}
		request = wrapped.Put
	case "delete-range":
		wrapped.DeleteRange = &pb.DeleteRangeRequest{}
		request = wrapped.DeleteRange
	case "txn":
		wrapped.Txn = &pb.TxnRequest{}
		request = wrapped.Txn
	case "compaction":
		wrapped.Compaction = &pb.CompactionRequest{}
		request = wrapped.Compaction
	case "lease-grant":
		wrapped.LeaseGrant = &pb.LeaseGrantRequest{}
		request = wrapped.LeaseGrant
	case "lease-revoke":
		wrapped.LeaseRevoke = &pb.LeaseRevokeRequest{}
		request = wrapped.LeaseRevoke
	case "lease-checkpoint", "alarm", "members-change", "member-publish", "cluster-version-set":
		return nil, nil
	default:
		return nil, fmt.Errorf("unknown operation %q", command.Op)
	}
	if err := proto.Unmarshal(data, request); err != nil {
		return nil, err
	}
	encoded, err := proto.Marshal(&wrapped)
	if err != nil {
		return nil, err
	}
	return parseEntryNormal(&raftpb.Entry{Data: encoded})
}
